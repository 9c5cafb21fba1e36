"""The rows that were measured, as tables by case and work, with a column a library."""

import pandas as pd

OURS = "jaxnorm"
OPTIONAL = ["milliseconds", "floor_milliseconds", "note"]


class Comparison:
    """`cases` are in order, as dicts with their `works`; times are in milliseconds.

    `times`, `ratios` (to jaxnorm's) and `over_floor` are tables by case and work, with
    NaN for what was not timed; `notes` are by case and library; `facts` are what else
    is known of each case, dtype and library.
    """

    def __init__(self, rows: list[dict]):
        frame = pd.DataFrame(rows)
        frame = frame.reindex(columns=[*dict.fromkeys([*frame, *OPTIONAL])])
        timed = frame.dropna(subset="milliseconds")
        timed = timed.assign(milliseconds=timed["milliseconds"].str[0])
        self.libraries = [*dict.fromkeys([OURS, *frame["library"]])]
        self.peers = self.libraries[1:]
        works = timed.groupby("case")["work"].unique()
        self.cases = {
            row["case"]: row | {"works": [*works.get(row["case"], [])]}
            for row in frame.drop_duplicates("case").to_dict("records")
        }
        by = ["case", "work"]
        times = timed.pivot_table("milliseconds", by, "library", sort=False)
        self.times = times.reindex(columns=self.libraries)
        self.ratios = self.times.div(self.times[OURS], axis=0)
        floors = timed.groupby(by, sort=False)["floor_milliseconds"].first()
        self.over_floor = self.times.div(floors, axis=0)
        notes = frame.dropna(subset="note").set_index(["case", "library"])["note"]
        self.notes = notes.to_dict()
        self.facts = timed.drop_duplicates(["case", "library"], keep="last")


def describe(case: dict) -> str:
    """The array of a case, in short."""
    batch, *space, channels = case["shape"]
    first = case["layout"] == "first"
    shape = (batch, channels, *space) if first else case["shape"]
    text = f"{'x'.join(map(str, shape))} {case['dtype']}"
    text += ", channels first" if first else ""
    return text + (f", {case['devices']} devices" if "sync" in case["op"] else "")
