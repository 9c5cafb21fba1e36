"""Twelve claims about normalization, put to the test.

Each page below asks of one claim from a paper whether it is seen again at a small
scale, on two CPU cores, with the norms of this library. The verdict follows from a rule
that stood in the file of the experiment before it was run. All results are committed as
they came out, also where a claim does not hold here.

**Rules.** All arms of an experiment share the net, the data, the weights at the start
and the order of the data, which one seed sets; only the norm, a value that the net
takes as an argument, differs. Where learning rates matter, each arm runs at its own
best one of five, chosen by the validation error of one run with a seed of its own.
Differences between arms are paired by seeds; their intervals are at 95 %, by Student's
t. A comparison is *held* if its whole interval is on the side of the claim, past the
least size that the rule states; it *did not hold* if the whole interval is elsewhere;
else it is *open*. A claim is held if all comparisons of its rule are; it did not hold
if one of them did not. Comparisons beside the rule are marked as such and decide
nothing.

**Data.**

- Fashion-MNIST: 20,000 images to train on, 5,000 to choose rates by, 10,000 to test
  on; from the Debian package `dataset-fashion-mnist`; MIT licence.
- Japanese Vowels: 216, 54 and 370 utterances of nine speakers, of 7 to 29 steps; from
  the wheel of `aeon`, which `pip download --no-deps aeon` fetches; CC BY 4.0.
- Digits (1,797 images), wine (178 rows) and breast cancer (569 rows): from
  scikit-learn; CC BY 4.0.

Nothing is downloaded by the experiments. A data set in another place is named with
`--data-dir`; experiments on images also run with `--data digits`, which is always
there.

**To repeat them**, from a checkout:

    pip install -e '.[experiments]'
    python -m experiments --list
    python -m experiments depth
    python -m experiments depth --quick

The third command runs one experiment, in minutes, and writes its numbers to
`experiments/results` and its figure to `docs/evidence`; the last one shows in seconds
that it works, with one seed and a twentieth of the steps. Each page says how long its
own run took, and on what machine.
"""

# In the order in which they are shown.
NAMES = (
    "rates",
    "depth",
    "regularization",
    "placement",
    "batch_size",
    "cost",
    "evaluation",
    "streams",
    "recurrent",
    "input_scale",
    "covariate_shift",
    "padding",
)
