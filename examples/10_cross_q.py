"""Learn to swing up a pendulum with batch norm in the critic and no target network.

From the root of the repository, in some two minutes on two CPU cores:

    python examples/10_cross_q.py

CrossQ (Bhatt et al., 2024, https://arxiv.org/abs/1902.05605) is soft actor-critic
without target networks. The actions of today's policy are not those in memory, so that
a batch of (s, a) and one of (s', a') have different statistics: normalized apart, the
two sides of Bellman's equation do not fit. CrossQ sends both through the critic as one
batch, with batch renorm that is batch norm at first.

It trains with both batches in one pass, with a pass for each, and without norms. The
pendulum is Gymnasium's Pendulum-v1, as a function of arrays: a run is a compiled scan.
"""

import sys
from functools import partial
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxnorm
from jaxnorm.linen import Norm

EPISODE, RANDOM_STEPS, BATCH_SIZE, HIDDEN = 200, 500, 128, 64
DISCOUNT, ACTOR_DELAY, WARM_UP = 0.99, 3, 2000
ADAM = optax.adam(1e-3, b1=0.5)


def rmax(step):
    return jnp.where(step < WARM_UP, 1.0, 3.0)


def dmax(step):
    return jnp.where(step < WARM_UP, 0.0, 5.0)


RENORM = jaxnorm.BatchRenorm(momentum=0.99, rmax=rmax, dmax=dmax)
# The norm of the critic, and whether (s, a) and (s', a') go through it as one batch.
CRITICS = {
    "one pass": (RENORM, True),
    "two passes": (RENORM, False),
    "no norm": (None, False),
}


# ---- The pendulum -----------------------------------------------------------------


def observed(state):
    angle = state[..., 0]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), state[..., 1]], -1)


def moved(state, action):
    """The state after a torque of twice the action, and the reward for it."""
    (angle, speed), torque = state, 2 * action[0]
    off = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    cost = off**2 + 0.1 * speed**2 + 0.001 * torque**2
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
    return jnp.stack([angle + 0.05 * speed, speed]), -cost


def started(key):
    return jax.random.uniform(key, (2,), minval=-1) * jnp.array([jnp.pi, 1])


# ---- The networks -----------------------------------------------------------------


class MLP(nn.Module):
    outputs: int
    norm: jaxnorm.Norm | None

    @nn.compact
    def __call__(self, x, train: bool):
        def normalized(x):
            return x if self.norm is None else Norm(self.norm)(x, not train)

        x = nn.relu(nn.Dense(HIDDEN)(normalized(x)))
        x = nn.relu(nn.Dense(HIDDEN)(normalized(x)))
        return nn.Dense(self.outputs)(normalized(x))


class Networks(NamedTuple):
    """A policy, and two critics in one, of arrays with a leading axis of 2."""

    actor: nn.Module
    critic: nn.Module
    one_pass: bool

    def init(self, key):
        actor = self.actor.init(key, jnp.zeros((2, 3)), False)
        critic = self.critic.init(key, jnp.zeros((2, 4)), False)
        return {"actor": actor, "critic": critic, "log_alpha": jnp.zeros(())}

    def act(self, variables, states, key, train=False):
        """Actions, the logarithms of their densities, and the new statistics."""
        out, stats = applied(self.actor, variables, observed(states), train)
        mean, log_std = jnp.split(out, 2, axis=-1)
        log_std = jnp.clip(log_std, -5, 2)
        noise = jax.random.normal(key, mean.shape)
        raw = mean + jnp.exp(log_std) * noise
        slope = 2 * (jnp.log(2) - raw - nn.softplus(-2 * raw))  # log of that of tanh
        density = -(noise**2 + jnp.log(2 * jnp.pi)) / 2 - log_std - slope
        return jnp.tanh(raw), density[:, 0], stats

    def values(self, variables, states, actions, train=False):
        """Two values of each state and action, (2, batch), and the new statistics."""
        x = jnp.concatenate([observed(states), actions], -1)
        values, stats = applied(self.critic, variables, x, train)
        return values[..., 0], stats

    def both_values(self, variables, batch, next_actions):
        """The values of a batch and of what came next, and the new statistics."""
        now, after = (batch["state"], batch["action"]), (batch["next"], next_actions)
        if self.one_pass:
            joint = (jnp.concatenate(pair) for pair in zip(now, after, strict=True))
            values, stats = self.values(variables, *joint, train=True)
            return *jnp.split(values, 2, axis=1), stats
        values, stats = self.values(variables, *now, train=True)
        return values, self.values(variables, *after, train=True)[0], stats


def applied(net, variables, x, train):
    y, new = net.apply(variables, x, train, mutable=["batch_stats"])
    return y, variables | new


def networks(norm: jaxnorm.Norm | None, one_pass: bool) -> Networks:
    how: Any = {"variable_axes": {"params": 0, "batch_stats": 0}, "in_axes": None}
    two: Any = nn.vmap(MLP, split_rngs={"params": True}, axis_size=2, **how)
    return Networks(MLP(2, norm), two(1, norm), one_pass)


# ---- Learning ---------------------------------------------------------------------


def critic_loss(params, nets: Networks, variables, batch, key):
    actions, density, _ = nets.act(variables["actor"], batch["next"], key)
    critic = variables["critic"] | {"params": params}
    values, after, critic = nets.both_values(critic, batch, actions)
    after = after.min(0) - jnp.exp(variables["log_alpha"]) * density
    target = jax.lax.stop_gradient(batch["reward"] + DISCOUNT * after)
    return ((values - target[None]) ** 2).mean(), critic


def actor_loss(params, nets: Networks, variables, batch, key):
    actor = variables["actor"] | {"params": params}
    actions, density, actor = nets.act(actor, batch["state"], key, train=True)
    values, _ = nets.values(variables["critic"], batch["state"], actions)
    loss = jnp.exp(variables["log_alpha"]) * density - values.min(0)
    return loss.mean(), (actor, density)


def improved(loss, params, opt_state, *args):
    """What a step makes of the parameters and the optimizer, and what comes along."""
    grads, aux = jax.grad(loss, has_aux=True)(params, *args)
    updates, opt_state = ADAM.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, aux


def learn_critic(nets, variables, opt_states, batch, key):
    args = variables["critic"]["params"], opt_states["critic"]
    params, state, critic = improved(critic_loss, *args, nets, variables, batch, key)
    critic = critic | {"params": params}
    return variables | {"critic": critic}, opt_states | {"critic": state}


def learn_actor(nets, variables, opt_states, batch, key):
    args = variables["actor"]["params"], opt_states["actor"]
    params, state, aux = improved(actor_loss, *args, nets, variables, batch, key)
    actor, lack = aux[0] | {"params": params}, (aux[1] - 1).mean()
    # The weight of the entropy rises where that is below its target, -1.
    args = variables["log_alpha"], opt_states["log_alpha"]
    log_alpha, alpha_state, _ = improved(lambda v: (-v * lack, None), *args)
    variables = variables | {"actor": actor, "log_alpha": log_alpha}
    return variables, opt_states | {"actor": state, "log_alpha": alpha_state}


def one_step(nets: Networks, carry, step):
    """Acts once, remembers it, and learns from a batch of memories."""
    *learnt, memory, state, key = carry
    key, *keys = jax.random.split(key, 5)
    action, *_ = nets.act(learnt[0]["actor"], state[None], keys[0])
    some = jax.random.uniform(keys[1], (1,), minval=-1)
    action = jnp.where(step < RANDOM_STEPS, some, action[0])
    after, reward = moved(state, action)
    new = {"state": state, "action": action, "reward": reward, "next": after}
    memory = {k: v.at[step].set(new[k]) for k, v in memory.items()}
    rows = jax.random.randint(keys[2], (BATCH_SIZE,), 0, step + 1)
    batch = {k: v[rows] for k, v in memory.items()}
    for learn, every in ((learn_critic, 1), (learn_actor, ACTOR_DELAY)):
        key, learn_key = jax.random.split(key)
        due = (step >= RANDOM_STEPS) & (step % every == 0)
        step_or_none = partial(learn, nets), lambda *args: args[:2]
        learnt = jax.lax.cond(due, *step_or_none, *learnt, batch, learn_key)
    ends = (step + 1) % EPISODE == 0
    state = jnp.where(ends, started(keys[3]), after)
    return (*learnt, memory, state, key), None


@partial(jax.jit, static_argnums=0)
def mean_return(nets: Networks, actor, key):
    """The mean sum of rewards of episodes in which the policy takes its best action."""

    def follow(states, _):
        out, _ = applied(nets.actor, actor, observed(states), False)
        states, rewards = jax.vmap(moved)(states, jnp.tanh(out[:, :1]))
        return states, rewards

    starts = jax.vmap(started)(jax.random.split(key, 32))
    return jax.lax.scan(follow, starts, length=EPISODE)[1].sum(0).mean()


@partial(jax.jit, static_argnums=(0, 1))
def train(nets: Networks, steps: int, carry, start):
    return jax.lax.scan(partial(one_step, nets), carry, start + jnp.arange(steps))[0]


def returns(nets: Networks, steps: int, seed: int = 0):
    """The mean return of the policy after each quarter of the steps."""
    keys = jax.random.split(jax.random.key(seed), 4)
    variables = nets.init(keys[0])
    opt_states = {k: ADAM.init(variables[k]["params"]) for k in ("actor", "critic")}
    opt_states["log_alpha"] = ADAM.init(variables["log_alpha"])
    shapes = {"state": (2,), "action": (1,), "reward": (), "next": (2,)}
    memory = {k: jnp.zeros((steps, *v)) for k, v in shapes.items()}
    carry = variables, opt_states, memory, started(keys[1]), keys[2]
    for quarter in range(4):
        carry = train(nets, steps // 4, carry, quarter * (steps // 4))
        yield float(mean_return(nets, carry[0]["actor"], keys[3]))


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=6000)
    print("mean return of 32 episodes, after each quarter of the steps:")
    for name, (norm, one_pass) in CRITICS.items():
        found = returns(networks(norm, one_pass), steps)
        print(f"    {name}:", *(f"{v:.0f}" for v in found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
