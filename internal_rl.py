"""Internal RL: reinforcement learning inside a frozen sequence model (arXiv 2512.20605), on a laptop CPU.

    python internal_rl.py --env grid                      # preset `classroom`: everything, from nothing
    python internal_rl.py --env grid --preset laptop      # the paper's 7x7 task, a model sized for a CPU
    python internal_rl.py --env grid --fast               # a smoke run of the same code, under a minute

Three phases, in the order of this file:

1. pretrain   A causal *base model* learns to predict the next action of unlabelled expert trajectories. It is
              then frozen for good.
2. discover   A *metacontroller* that sees the whole trajectory (it is non-causal) learns to steer the base's
              residual stream with linear controllers, each held until a learned gate ends it.
3. rl         A causal policy replaces the metacontroller's encoder. Its actions are controllers, one per
              opening of the gate, and it learns a longer task from one sparse reward at the very end.

A run prints the base's distance to the Bayes floor, how well ground-truth controllers steer it, a raster of
true subgoals over switch marks, the learning curve, and a block of `key: value` lines. It writes checkpoints,
metrics.csv, config.json, results.json and three figures to --out. Run it again to resume after an interruption.

Glossary (B episodes, T steps, D width of the residual stream, Z size of a code, R rank of a controller)

    here              paper    shape        meaning                                                  where
    residual          e_t      (B, T, D)    residual stream of the base after block `control_block`  Eq. 1
    history           h_t      (B, T, H)    GRU over e_1..e_t                                         App. D.2
    summary           s        (B, T, S)    embedding of the future, read backwards in time           App. D.2
    mean, log_std     mu, Sig  (B, T, Z)    the encoder's Gaussian over the code proposal             Eq. 11-18
    proposal          z~_t     (B, T, Z)    sample of that Gaussian                                   App. D.2
    gate              beta_t   (B, T)       1 adopts the proposal, 0 keeps the code                   Eq. 2
    code              z_t      (B, T, Z)    z_t = beta_t z~_t + (1 - beta_t) z_t-1                    Eq. 2
    controller        U_t      2 (B,T,R,D)  low-rank factors: U = out^T inn                           Eq. 3
    kl_weight         alpha    scalar       price of a nat of code                                    Eq. 3

Simplified or changed on purpose (README, "Departures from the paper", has the ablations): observations are
written relative to the agent; the base's targets are the expert's action probabilities; the encoder reads a
*mirrored* copy of the episode; a switch gives the base a fresh start; the summary is read backwards instead of
being one vector; the control is centred and sits early in the network.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import envs

# ----------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A run that cannot go on: printed as one line. `status` 2 is bad input, 1 a failed run."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Comments: meaning (source)."""

    # task
    world: str = "small"  # task set in envs.TASK_SETS (paper: App. A; small: ours)
    eval_episodes: int = 1024  # held-out episodes and post-training rollouts
    # base model (paper: App. C.1, D.1)
    block: str = "hawk"  # hawk | transformer (paper: transformer on the grid, Hawk on the ant)
    layers: int = 4  # blocks (paper: 6)
    dim: int = 96  # D, width of the residual stream (paper: n_e = 256)
    heads: int = 4  # attention heads, transformer only (paper)
    mlp: int = 512  # hidden units of each MLP (paper: 512)
    gated_mlp: bool = True  # SwiGLU instead of ReLU (ours)
    relative_obs: bool = True  # objects at their offset from the agent, not at their cell (ours)
    init_scale: float = 0.33  # variance of initial weights x fan-in (paper: 0.1)
    control_block: int = 1  # the controller acts after this many blocks (paper: layers / 2)
    # phase 1: pretrain
    pretrain_steps: int = 2700  # (paper: 256,000)
    pretrain_batch: int = 128  # episodes (paper: 1024)
    pretrain_lr: float = 6e-3  # peak, cosine to 0.02 of it (paper: 3e-4 constant)
    pretrain_muon: bool = True  # Muon for the blocks' matrices, AdamW for the rest (paper: AdamW)
    weight_decay: float = 0.03  # in phase 1 (paper: in phase 2 too)
    obs_loss: float = 0.0  # lambda, weight of next-observation prediction (paper: 0 or 0.01)
    soft_targets: bool = True  # the expert's probabilities, not its sampled action, as target (ours)
    noise: float = 0.0  # eps, random expert actions in phase 1 (paper); ant: deviation of torque noise (ours)
    displace: float = 0.1  # chance per step of a jump to a random cell, in phases 1 and 2 (ours)
    on_colour: float = 0.5  # share of episodes that start on a colour, in phases 1 and 2 (ours)
    ant_steps: int = 16  # training episodes of the ant are cut after this many decisions, finished or not (ours)
    ant_spliced: float = 1.0  # share of its batches that are spliced from strides, not simulated (ours)
    ant_short: float = 0.0  # share of spliced episodes of phase 1 with short steps (ours)
    forget: tuple[float, ...] = (0.0, 0.0, 1.0)  # per episode: chance per step to lose all memory (ours)
    memory: str = "segment"  # of the steered base: none | segment (since the last switch) | full (paper)
    # controllers
    rank: int = 16  # of the controller (paper: 16 on the grid)
    centred: bool = True  # U acts on e_t minus its mean, so that it cannot write a constant (ours)
    # check: one controller per ground-truth subgoal
    steer_steps: int = 700  # (ours)
    steer_batch: int = 64  # episodes (ours)
    steer_lr: float = 5e-3  # peak, cosine (ours)
    elsewhere: float = 0.0  # ant, and in phase 2: no jumps, but this share of actions is the expert's elsewhere (ours)
    # metacontroller (paper: App. D.2, Table of sizes)
    history_dim: int = 32  # n_h (paper)
    summary_dim: int = 32  # n_s (paper)
    encoder_hidden: int = 64  # (paper)
    code_dim: int = 8  # n_z (paper)
    decoder_hidden: int = 32  # (paper)
    smooth_decoder: bool = False  # SiLU in the decoder, where ReLUs die before there are codes to decode (ours, ant)
    summary: str = "backward"  # backward: s_t embeds o_t..o_T | whole: one s for the episode (paper)
    # phase 2: discover
    mirror: bool = True  # the encoder sees a rotated or reflected copy of the episode (ours)
    discover_steps: int = 2000  # (paper: 64,000)
    discover_batch: int = 64  # (paper: 512)
    discover_lr: float = 6e-3  # peak, cosine (paper: 1e-3 constant)
    kl_weight: float = 0.1  # alpha (paper: searched in 0 .. 1)
    kl_ramp: tuple[int, ...] = (100, 500)  # alpha grows linearly from 0 between these steps (ours)
    kl_at_switches: bool = False  # the KL is charged where the gate opens, not at every step (ours, ant)
    ant_whole: int = 0  # decisions of spliced episodes in phase 2, which end with a visit; 0: as in phase 1 (ours)
    ant_pause: float = 0.0  # chance per spliced decision of phase 2 to hardly move (ours)
    discover_blind: int = 1500  # first steps of phase 2, in which the base has no memory at all (ours)
    discover_held: int = 2000  # until here the gate does not learn from memory, and codes are held (ours)
    hold: int = 0  # a held code serves at least n steps, n ~ U{0..hold} drawn per episode (ours)
    gate_bias: float = 0.0  # initial bias of the switching unit's logit (not given in the paper)
    # acting with codes: random ones after phase 2, chosen ones in phase 3
    rl_temperature: float = 0.3  # of the base's actions in internal RL (paper: 1)
    rl_threshold: float = 0.5  # the gate opens above this (paper; ant: ours)
    random_episodes: int = 49_152  # rollouts of random codes, to measure a success of order 1e-4
    # phase 3: internal RL (paper: App. C.5)
    rl_episodes: int = 100_000  # (paper: up to 100,000 x 1024)
    rl_batch: int = 1024  # episodes per update (paper)
    rl_decisions: int = 12  # learn from an episode's first n switches; few lost episodes have more (ours)
    rl_lr: float = 1e-3  # Adam (paper: 3e-5)
    rl_std_lr: float = 5e-3  # Adam, of the policy's standard deviation (ours)
    rl_anneal: bool = False  # the rate falls linearly to 0, that of the standard deviation rises from 0 (ours, ant)
    rl_epochs: int = 4  # passes over a batch
    rl_minibatches: int = 4  # updates per pass
    rl_clip: float = 0.2  # PPO clip of the ratio (paper)
    rl_lambda: float = 1.0  # of the advantage; below 1 with a critic (paper: no critic; below 1: ours, ant)
    policy_dim: int = 64  # width of the one-block recurrent policy (paper: 256)
    policy_std: float = 1.0  # initial standard deviation, that of the codes' prior
    raw_lr: float = 1e-4  # raw-action RL, which fine-tunes the base (paper: 3e-5)
    raw_failures: int = 100_000  # it learns from all successes of a batch, and from this many failures at most (ours)


CLASSROOM = Config()
PAPER = replace(
    CLASSROOM, world="paper", block="transformer", layers=6, dim=256, mlp=512, gated_mlp=False,
    relative_obs=False, init_scale=0.1, control_block=3, centred=False, pretrain_steps=256_000,
    pretrain_batch=1024, pretrain_lr=3e-4, pretrain_muon=False, obs_loss=0.01, soft_targets=False,
    displace=0.0, on_colour=0.0, forget=(0.0,), summary="whole", mirror=False, memory="full",
    discover_steps=64_000, discover_batch=512, discover_lr=1e-3, discover_blind=0, discover_held=0,
    kl_weight=0.17, kl_ramp=(0, 1), rl_episodes=102_400_000, rl_lr=3e-5, rl_epochs=1, rl_minibatches=1,
    policy_dim=256, raw_lr=3e-5,
)  # fmt: skip
GRID = {
    "classroom": CLASSROOM,
    "laptop": replace(
        CLASSROOM, world="paper", pretrain_steps=10_000, pretrain_batch=64, pretrain_lr=5e-3, steer_steps=1500,
        discover_blind=800, discover_held=1300, hold=12, discover_steps=6500, discover_batch=32, discover_lr=3e-3,
        kl_weight=0.05, kl_ramp=(300, 1300), rl_episodes=400_000, rl_batch=4096, random_episodes=65_536,
    ),
    "paper": PAPER,
}  # fmt: skip
ANT = {
    "classroom": replace(
        CLASSROOM, world="ant", dim=128, control_block=0, noise=0.05, memory="none", displace=0.4, elsewhere=0.7,
        ant_short=0.4, obs_loss=10.0, smooth_decoder=True, kl_at_switches=True, pretrain_steps=5000, pretrain_lr=5e-3,
        steer_steps=1600, steer_lr=6e-3, discover_steps=4000, discover_lr=2e-3, discover_blind=0, discover_held=0,
        ant_pause=0.4, ant_whole=24, kl_weight=0.9, kl_ramp=(300, 1500), rl_batch=256, rl_episodes=30_720,
        rl_anneal=True, rl_lambda=0.2, rl_threshold=0.4, eval_episodes=512, random_episodes=4096, raw_failures=16,
    ),
    "paper": replace(
        PAPER, world="ant", block="hawk", layers=8, control_block=4, obs_loss=10.0, ant_steps=500, ant_spliced=0.0,
        pretrain_steps=204_800, pretrain_batch=512, discover_steps=32_000, discover_batch=128,
        discover_lr=3e-4, rl_episodes=13_107_200, rl_batch=256,
    ),
}  # fmt: skip
PRESETS = {"grid": GRID, "ant": ANT}
FAST = {
    "pretrain_steps": 30, "pretrain_batch": 32, "steer_steps": 10, "discover_steps": 20, "discover_batch": 16,
    "discover_blind": 7, "discover_held": 14, "kl_ramp": (5, 10), "rl_episodes": 256, "rl_batch": 128,
    "eval_episodes": 32, "random_episodes": 128, "layers": 2, "dim": 32, "mlp": 64, "control_block": 1,
    "ant_steps": 8, "ant_whole": 8,
}  # fmt: skip


def check_config(c: Config) -> None:
    """Raise Failure, naming the flag, unless the values of `c` make sense together."""
    choices = {
        "world": tuple(envs.TASK_SETS), "block": ("hawk", "transformer"),
        "memory": ("none", "segment", "full"), "summary": ("backward", "whole"),
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            raise Failure(f"--{name}={getattr(c, name)}: must be one of {', '.join(allowed)}")
    for f in fields(c):
        value = getattr(c, f.name)
        may_be_zero = "control_block", "rl_episodes", "hold", "ant_whole", "discover_blind", "discover_held"
        least = 0 if f.name.endswith("_steps") or f.name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise Failure(f"--{f.name}={value}: must be at least {least}")
        if isinstance(value, float) and not 0 <= value < math.inf and f.name != "gate_bias":
            raise Failure(f"--{f.name}={value}: must be a finite number, not negative")
    for name in ("noise", "displace", "on_colour"):
        if not 0 <= getattr(c, name) < 1:
            raise Failure(f"--{name}={getattr(c, name)}: must be in [0, 1)")
    if not c.forget or not all(0 <= rate <= 1 for rate in c.forget):
        raise Failure(f"--forget={c.forget}: must be probabilities, such as 0,0.5,1")
    if len(c.kl_ramp) != 2 or c.kl_ramp[0] >= c.kl_ramp[1]:
        raise Failure(f"--kl_ramp={c.kl_ramp}: must be two steps, first,last, the first the smaller")
    if c.control_block > c.layers:
        raise Failure(f"--control_block={c.control_block}: must be between 0 and --layers={c.layers}")
    if c.dim % c.heads:
        raise Failure(f"--dim={c.dim}: must be a multiple of --heads={c.heads}")
    for name in ("ant_spliced", "ant_short", "elsewhere", "ant_pause", "rl_lambda"):
        if not 0 <= getattr(c, name) <= 1:
            raise Failure(f"--{name}={getattr(c, name)}: must be in [0, 1]")
    if c.elsewhere and not (envs.TASK_SETS[c.world].ant and c.ant_spliced == 1 and c.memory == "none"):
        raise Failure(f"--elsewhere={c.elsewhere}: must be 0 but for the ant with --ant_spliced 1 and --memory none")
    for name in ("rl_temperature", "policy_std", "init_scale"):
        if getattr(c, name) <= 0:
            raise Failure(f"--{name}={getattr(c, name)}: must be above 0")
    if c.eval_episodes < 16:
        raise Failure(f"--eval_episodes={c.eval_episodes}: must be at least 16")


# ----------------------------------------------------------------------------------------------------
# Base model (paper: App. C.1, D.1): two causal blocks that can be exchanged
#
# Every causal module maps (x (B, T, D), keep (B, T), state) to (y, state). T > 1 is the parallel form, T = 1 with
# the state carried along is the step form. keep_t says what is carried from step t-1 into step t: 1 everything,
# 0 nothing, step t starts afresh as an episode does; -1 nothing either, but the base can tell this from a start.
# A state is a tuple of tensors with the batch first.
# ----------------------------------------------------------------------------------------------------


class LinearRecurrence(torch.autograd.Function):
    """h_t = a_t h_t-1 + b_t for a, b (B, T, D) and h_0 (B, D).

    A plain loop over time with a hand-written backward: autograd would keep a node per step, twice as slow.
    """

    @staticmethod
    def forward(ctx, a, b, h0):
        h, last = torch.empty_like(b), h0
        for t in range(b.shape[1]):
            last = torch.addcmul(b[:, t], a[:, t], last, out=h[:, t])
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h, h0 = ctx.saved_tensors
        db = grad.clone()  # dL/db_t = dL/dh_t in total = grad_t + a_t+1 dL/dh_t+1
        for t in range(grad.shape[1] - 1, 0, -1):
            db[:, t - 1].addcmul_(a[:, t], db[:, t])
        before = torch.cat([h0[:, None], h[:, :-1]], dim=1)
        return db * before, db, a[:, 0] * db[:, 0]


class HawkMixer(nn.Module):
    """Temporal mixing of Hawk: a gated linear recurrence (RG-LRU) behind a short convolution (here 2 taps)."""

    def __init__(self, c: Config):
        super().__init__()
        self.inp = nn.Linear(c.dim, c.dim, bias=False)
        self.branch = nn.Linear(c.dim, c.dim, bias=False)
        self.taps = nn.Parameter(torch.stack([torch.ones(c.dim), torch.zeros(c.dim)]))
        self.gates = nn.Linear(c.dim, 2 * c.dim)
        self.start = nn.Parameter(torch.zeros(c.dim))  # the memory with which an episode starts
        self.decay = nn.Parameter(torch.linspace(0.5, 4.6, c.dim))  # slowest a between 0.02 and 0.92 per step
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def initial(self, B: int):
        start = self.start.repeat(B, 1)
        return start, torch.zeros_like(start)

    def forward(self, x, keep, state):
        h0, u0 = state
        keep = keep[..., None]
        afresh, keep = (1 - keep) * (keep >= 0), keep.clamp_min(0)
        u = self.inp(x)
        u_before = torch.cat([u0[:, None], u[:, :-1]], dim=1)
        v = self.taps[0] * u + self.taps[1] * keep * u_before
        r, i = torch.sigmoid(self.gates(v)).chunk(2, dim=-1)
        # a_t = sigmoid(decay)^(8 r_t);  h_t = a_t (keep_t h_t-1 + afresh_t start) + sqrt(1 - a_t^2) i_t v_t
        a = torch.exp(8 * r * F.logsigmoid(self.decay))
        b = torch.sqrt(1 - a * a + 1e-6) * i * v
        h = LinearRecurrence.apply(keep * a, torch.addcmul(b, a, afresh * self.start), h0)
        return self.out(F.gelu(self.branch(x)) * h), (h[:, -1], u[:, -1])


class AttentionMixer(nn.Module):
    """Causal multi-head attention with a T5-style relative bias (32 buckets); forgetting is one more bias."""

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(c.heads, self.BUCKETS))
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def initial(self, B: int):
        H, d = self.heads, self.out.in_features // self.heads
        return self.bias.new_zeros(B, H, 0, d), self.bias.new_zeros(B, H, 0, d), self.bias.new_zeros(B, 0)

    def bucket(self, distance):
        """Distances 0..15 have a bucket each, longer ones share buckets on a log scale."""
        exact = self.BUCKETS // 2
        ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.FARTHEST / exact)
        coarse = exact + (ratio * (self.BUCKETS - exact)).long()
        return torch.where(distance < exact, distance, coarse.clamp(max=self.BUCKETS - 1))

    def forward(self, x, keep, state):
        B, T, D = x.shape
        keys, values, log_kept = state
        S = keys.shape[2]
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        # What step s wrote reaches step t times keep_s+1 ... keep_t: the log of that is added to the score.
        start = log_kept[:, -1:] if S else 0.0
        log_kept = torch.cat([log_kept, start + keep.clamp_min(1e-9).log().cumsum(dim=1)], dim=1)
        distance = torch.arange(S, S + T, device=x.device)[:, None] - torch.arange(S + T, device=x.device)
        bias = self.bias[:, self.bucket(distance.clamp_min(0))] + (log_kept[:, S:, None] - log_kept[:, None])[:, None]
        bias = bias.masked_fill(distance < 0, -torch.inf)  # (B, H, T, S + T)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(B, T, D)), (keys, values, log_kept)


class MLP(nn.Module):
    """ReLU MLP as in the paper, or SwiGLU (gated): the base must multiply "which goal" by "where it lies"."""

    def __init__(self, c: Config):
        super().__init__()
        self.up = nn.Linear(c.dim, c.mlp, bias=False)
        self.gate = nn.Linear(c.dim, c.mlp, bias=False) if c.gated_mlp else None
        self.down = nn.Linear(c.mlp, c.dim, bias=False)

    def forward(self, x):
        if self.gate is None:
            return self.down(F.relu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm residual block: x + mix(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config):
        super().__init__()
        self.mix_norm, self.mlp_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)
        self.mixer = HawkMixer(c) if c.block == "hawk" else AttentionMixer(c)
        self.mlp = MLP(c)

    def forward(self, x, keep, state):
        y, state = self.mixer(self.mix_norm(x), keep, state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class GridEmbedding(nn.Module):
    """Linear map of the grid observation, given as the cells of its ones: (B, T, O + W + 1) -> (B, T, D).

    Absolute: a weight vector for each (object, cell), which is a plain linear layer on the 637 numbers. Relative:
    a vector for each (object, offset from the agent), a bijection of the same observation that is learned many
    times faster. There the colours share their geometry: vector = features(offset) @ matrix(colour) +
    obstacle(offset); walls, whose names mean nothing, are obstacles and no more.
    """

    FEATURES = 24

    def __init__(self, c: Config, dim: int):
        super().__init__()
        world = envs.TASK_SETS[c.world]
        self.world, self.relative = world, c.relative_obs
        cells = world.size**2
        self.register_buffer("offset", torch.from_numpy(envs.offset_table(world.size)), persistent=False)
        if self.relative:
            self.offsets = (2 * world.size - 1) ** 2
            self.features = nn.Parameter(0.5 * torch.randn(self.offsets, self.FEATURES))
            self.colour = nn.Parameter(torch.randn(world.colours, self.FEATURES, dim) * self.FEATURES**-0.5)
            self.obstacle = nn.Parameter(0.1 * torch.randn(self.offsets, dim))
            self.agent = nn.Parameter(0.1 * torch.randn(cells, dim))
            row = [*range(world.colours), *[world.colours] * world.walls, world.colours + 1]
            first_row = torch.tensor(row) * self.offsets
        else:
            self.weight = nn.Parameter(torch.randn(world.objects * cells, dim) * (c.init_scale / world.objects) ** 0.5)
            first_row = torch.arange(world.objects) * cells
        self.register_buffer("first_row", first_row, persistent=False)

    def places(self, cells):
        """Column and row of each colour, each wall and the agent in units of cells, (..., O + W + 1, 2)."""
        return torch.stack([cells % self.world.size, cells // self.world.size], dim=-1) + 0.5

    def table(self):
        """One row per (object, place), (rows, D)."""
        if not self.relative:
            return self.weight
        colours = self.features @ self.colour + self.obstacle
        return torch.cat([colours.flatten(0, 1), self.obstacle, self.agent])

    def forward(self, cells):
        if self.relative:
            agent = cells[..., -1:]
            cells = torch.cat([self.offset[cells[..., :-1], agent], agent], dim=-1)
        rows = (cells + self.first_row).flatten(0, -2)
        return F.embedding_bag(rows, self.table(), mode="sum").unflatten(0, cells.shape[:-1])


class AntEmbedding(nn.Module):
    """The ant's observation (B, T, F) -> (B, T, D).

    Absolute: a linear map of the observation. Relative: the cells of colours, walls and ant go through
    `GridEmbedding`; the body is seen in its own frame, together with the direction of each neighbouring cell's centre.
    The body gets a quarter of the width to itself: added to the cells, it would drown them. And the colour that the
    ant stands on gets an eighth: the metacontroller must find the visits among all that the residual says.
    """

    def __init__(self, c: Config):
        super().__init__()
        world = envs.TASK_SETS[c.world]
        self.size, self.parts, self.relative = world.size, envs.ant_slices(world), c.relative_obs
        width, under = (c.dim // 4, c.dim // 8) if self.relative else (c.dim, 0)
        self.cells = GridEmbedding(c, c.dim - width - under) if self.relative else None
        self.under = nn.Parameter(3 * torch.randn(world.colours, under)) if self.relative else None
        self.body = nn.Linear(35 if self.relative else self.parts["local"].stop, width)

    def forward(self, obs):
        if not self.relative:
            return self.body(obs)
        height, orientation, joints, velocity, _, _, local = (obs[..., part] for part in self.parts.values())
        column, row = self.places(obs).floor().long().clamp(0, self.size - 1).unbind(-1)
        cells = row * self.size + column
        stands_on = (cells[..., : len(self.under)] == cells[..., -1:]).to(obs.dtype)
        # Vectors of the plane as complex numbers, turned into the frame of the torso.
        w, x, y, z = (orientation.sign() * orientation.abs().expm1()).unbind(-1)
        yaw = torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        centres = torch.tensor([[0, 2], [0, -2], [-2, 0], [2, 0]], dtype=obs.dtype, device=obs.device)
        steps = F.normalize(centres - local[..., None, :], dim=-1)  # towards the centre above, below, left, right
        plane = torch.cat([velocity[..., None, :2], local[..., None, :], steps], dim=-2).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(plane) * torch.polar(torch.ones_like(yaw), -yaw)[..., None])
        tilt = torch.stack([w * x + y * z, w * y - x * z], dim=-1)
        body = torch.cat([height, tilt, joints, velocity[..., 2:], turned.flatten(-2)], dim=-1)
        return torch.cat([self.cells(cells), stands_on @ self.under, self.body(body)], dim=-1)

    def places(self, obs):
        """Column and row of each colour, each wall and the ant in units of cells, (..., O + W + 1, 2)."""
        xy, things = obs[..., None, self.parts["xy"]], obs[..., self.parts["things"]].unflatten(-1, (-1, 2))
        return (1 + torch.cat([xy + things, xy], dim=-2) * obs.new_tensor([1, -1])) * self.size / 2


class Categorical(nn.Linear):
    """Action head of the grid: logits (..., 4) of the four moves."""

    def __init__(self, c: Config):
        super().__init__(c.dim, 4)

    def nll(self, logits, episodes, run: Run, soft: bool):
        target = run.tensor(episodes.expert)
        if not soft:
            target = F.one_hot(run.tensor(episodes.actions), 4).float()
        return -(target * F.log_softmax(logits, dim=-1)).sum(-1)

    def log_prob(self, logits, action, temperature: float = 1.0):
        return F.log_softmax(logits / temperature, dim=-1).gather(-1, action[..., None])[..., 0]

    def sample(self, logits, temperature: float, generator):
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


class Gaussian(nn.Linear):
    """Action head of the ant: mean (..., 8) of the torques; their deviation is learned and the same everywhere."""

    def __init__(self, c: Config):
        super().__init__(c.dim, 8)
        self.log_std = nn.Parameter(torch.full((8,), -1.0))

    def nll(self, mean, episodes, run: Run, soft: bool):
        return -self.log_prob(mean, run.tensor(episodes.actions))

    def log_prob(self, mean, action, temperature: float = 1.0):
        return gaussian_log_prob(action, mean, self.log_std + math.log(temperature))

    def sample(self, mean, temperature: float, generator):
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + temperature * self.log_std.exp() * noise


class BaseModel(nn.Module):
    """The causal sequence model that is pretrained, then frozen. `lower` ends where the controller acts."""

    def __init__(self, c: Config):
        super().__init__()
        self.control_block = c.control_block
        world = envs.TASK_SETS[c.world]
        self.embed = AntEmbedding(c) if world.ant else GridEmbedding(c, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim)
        self.action_head = Gaussian(c) if world.ant else Categorical(c)
        # What moves: the ant's observation, or on the grid the agent's cell.
        self.next_head = nn.Linear(c.dim, envs.ant_slices(world)["local"].stop if world.ant else world.size**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(c.init_scale / module.in_features) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def initial(self, B: int) -> list:
        return [block.mixer.initial(B) for block in self.blocks]

    def _run(self, blocks: range, x, keep, state):
        state = self.initial(len(x)) if state is None else list(state)
        for i in blocks:
            x, state[i] = self.blocks[i](x, keep, state[i])
        return x, state

    def lower(self, cells, keep, state=None):
        """Observations as cells (B, T, O + W + 1) | (B, T, F), keep (B, T) -> residual (B, T, D), state."""
        return self._run(range(self.control_block), self.embed(cells), keep, state)

    def upper(self, residual, keep, state=None):
        """residual (B, T, D), keep (B, T) -> action logits (B, T, 4) | mean torques (B, T, 8), state."""
        x, state = self._run(range(self.control_block, len(self.blocks)), residual, keep, state)
        return self.action_head(self.norm(x)), state

    def forward(self, cells, keep, keep_lower=None):
        """Action logits (B, T, 4) of the model left alone."""
        residual, _ = self.lower(cells, keep if keep_lower is None else keep_lower)
        return self.upper(residual, keep)[0]

    def residuals(self, cells, keep) -> list:
        """The residual stream after the embedding and after each block: layers + 1 times (B, T, D)."""
        x, streams = self.embed(cells), []
        streams.append(x)
        for block, state in zip(self.blocks, self.initial(len(x))):
            x, _ = block(x, keep, state)
            streams.append(x)
        return streams


# ----------------------------------------------------------------------------------------------------
# Metacontroller (paper: Sec. 3, App. D.2, Eqs. 1-3 and 11-18)
# ----------------------------------------------------------------------------------------------------


def apply_controller(residual, controller, mean):
    """e^ = e + U (e - mean) with U = out^T inn of rank R, never a D x D matrix.

    residual (..., D), controller = (out, inn), each (..., R, D); mean (D,) is 0 in the paper.
    """
    out, inn = controller
    coordinates = torch.einsum("...rd,...d->...r", inn, residual - mean)
    return residual + torch.einsum("...r,...rd->...d", coordinates, out)


def shift_right(x):
    """x_1..x_T -> 0, x_1..x_T-1 along time (dim 1)."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def memory_after(gate, memory: str):
    """keep (B, T) of the steered base. segment: each switch is a fresh start, as if an episode began there."""
    return 1 - gate if memory == "segment" else torch.full_like(gate, 1.0 if memory == "full" else -1.0)


class Labels(nn.Module):
    """One controller per ground-truth subgoal: not part of the method, but the check that steering can work."""

    def __init__(self, c: Config, mean, count: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.out = nn.Parameter(torch.zeros(count, c.rank, c.dim))  # starts as no control at all
        self.inn = nn.Parameter(torch.randn(count, c.rank, c.dim) * c.dim**-0.5)

    def controller(self, subgoal):
        return self.out[subgoal], self.inn[subgoal]


class Metacontroller(nn.Module):
    """Discovers codes and when to switch them.

    The encoder is non-causal and reads a copy of the episode (`view`, mirrored in our presets); the switching
    unit is causal and reads the episode itself. `mean` (D,) is subtracted before control.
    """

    def __init__(self, c: Config, mean):
        super().__init__()
        D, H, S, Z = c.dim, c.history_dim, c.summary_dim, c.code_dim
        self.code_dim, self.rank, self.whole = Z, c.rank, c.summary == "whole"
        self.register_buffer("mean", mean)
        self.history = nn.GRU(D, H, batch_first=True)
        self.embedder = nn.GRU(D, S, batch_first=True)
        self.encoder = nn.Sequential(
            nn.Linear(D + H + S, c.encoder_hidden), nn.ReLU(), nn.Linear(c.encoder_hidden, 2 * Z)
        )
        self.switch = nn.Sequential(nn.Linear(D + H + Z, c.encoder_hidden), nn.ReLU(), nn.Linear(c.encoder_hidden, 1))
        self.decoder = nn.Sequential(
            nn.Linear(Z, c.decoder_hidden),
            nn.SiLU() if c.smooth_decoder else nn.ReLU(),
            nn.Linear(c.decoder_hidden, 2 * c.rank * D),
        )
        nn.init.constant_(self.switch[2].bias, c.gate_bias)
        # The factor that writes starts at zero, which is no control; the one that reads at random.
        with torch.no_grad():
            for parameter in (self.decoder[2].weight, self.decoder[2].bias):
                parameter[: c.rank * D].zero_()
                parameter[c.rank * D :].normal_(std=D**-0.5)

    def encode(self, view, length):
        """Posterior of the code proposals -> mean, log_std, each (B, T, Z).

        view (B, T + 1, D), where row `length` (B,) is an episode's last observation and the rest padding. The
        paper's s is one vector for the episode; ours, s_t, is read backwards from the end down to t.
        """
        history = shift_right(self.history(view)[0])
        # Position t of the reversed episode is length - t; what lies beyond the end is padding again.
        reverse = (length[:, None] - torch.arange(view.shape[1], device=view.device)).clamp_min(0)[..., None]
        backward = self.embedder(view.gather(1, reverse.expand_as(view)))[0]
        backward = backward.gather(1, reverse.expand_as(backward))
        summary = backward[:, :1].expand_as(backward) if self.whole else backward
        mean, log_std = self.encoder(torch.cat([view, history, summary], dim=-1)[:, :-1]).chunk(2, dim=-1)
        return mean, log_std

    def gate(self, residual, history, code):
        """beta_t = f_switch(e_t, h_t-1, z_t-1) in [0, 1], causal: (..., D), (..., H), (..., Z) -> (...)."""
        return torch.sigmoid(self.switch(torch.cat([residual, history, code], dim=-1))).squeeze(-1)

    def integrate(self, residual, proposal, hold=None, hard=False):
        """Temporal integration, Eq. 2. residual (B, T, D), proposal (B, T, Z) -> code (B, T, Z), gate (B, T).

        hold (B,): the gate stays shut for this many steps after it opened. hard rounds it, as in phase 3.
        """
        history = shift_right(self.history(residual)[0])
        gate = torch.ones_like(proposal[:, 0, 0])  # the first step always adopts
        code = proposal[:, 0]
        codes, gates = [code], [gate]
        age = torch.zeros_like(gate)  # steps that the code has served
        for t in range(1, proposal.shape[1]):
            gate = self.gate(residual[:, t], history[:, t], code)
            if hard:
                gate = (gate > 0.5).float()
            if hold is not None:
                age = age + 1
                gate = gate * (age > hold)
                age = age * (gate < 0.5)
            # beta_t = 1 adopts the new code
            code = gate[:, None] * proposal[:, t] + (1 - gate[:, None]) * code
            codes.append(code)
            gates.append(gate)
        return torch.stack(codes, dim=1), torch.stack(gates, dim=1)

    def controller(self, code):
        """Hypernetwork: code (..., Z) -> factors (out, inn) of U, each (..., R, D)."""
        return self.decoder(code).unflatten(-1, (2, self.rank, -1)).unbind(-3)


def code_kl(mean, log_std):
    """KL( N(mean, std^2) || N(0, I) ) in nats: (..., Z) -> (...)."""
    return 0.5 * (mean**2 + torch.exp(2 * log_std) - 2 * log_std - 1).sum(-1)


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, exp(log_std)^2), summed over the last dimension."""
    return (-0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


# ----------------------------------------------------------------------------------------------------
# Running: seeds, data, progress, losses shared by the phases
# ----------------------------------------------------------------------------------------------------

# Offsets that keep the random streams of the phases apart: phase k depends on (config, seed, phase k-1) alone.
STREAMS = {"pretrain": 0, "steer": 1, "discover": 2, "rl": 3, "raw": 4, "test": 5, "evaluate": 6, "figures": 7}


def check_finite(phase: str, **metrics) -> None:
    """Raise Failure (a failed run, status 1) if training has diverged."""
    if not all(math.isfinite(value) for value in metrics.values()):
        raise Failure(f"{phase}: not a finite number: {metrics}; lower the learning rate", 1)


class Run:
    """What every phase needs besides its inputs: config, seed, device, random streams, log."""

    def __init__(self, config: Config, seed: int, device: torch.device, out: Path | None = None, quiet=False):
        self.config, self.seed, self.device, self.out, self.quiet = config, seed, device, out, quiet
        self.world = envs.TASK_SETS[config.world]
        self.phase, self.started, self.shown = "", time.time(), 0.0
        self.test_episodes = self.strides = None

    def start(self, phase: str) -> tuple[np.random.Generator, torch.Generator]:
        """Begin a phase: seed everything for it; returns a numpy and a torch generator."""
        number = 1000 * self.seed + STREAMS[phase]
        torch.manual_seed(number)
        self.phase, self.started, self.shown = phase, time.time(), 0.0
        return np.random.default_rng(number), torch.Generator(self.device).manual_seed(number)

    def seconds(self) -> float:
        return time.time() - self.started

    def tensor(self, array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def log(self, step: int, total: int, unit: str, every: float = 10.0, **metrics) -> None:
        """Show progress at most each `every` seconds (and at the end) and append it to metrics.csv."""
        check_finite(f"{self.phase}, step {step}", **metrics)
        elapsed = self.seconds()
        if step < total and elapsed - self.shown < every:
            return
        self.shown = elapsed
        left = elapsed / max(step, 1) * (total - step)
        if not self.quiet:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(
                f"{self.phase:9s}{step:>8,}/{total:,} {unit}  {numbers}  {elapsed:.0f} s, ETA {left:.0f} s", flush=True
            )
        if self.out:
            with open(self.out / "metrics.csv", "a", newline="") as file:
                rows = ((self.phase, step, round(elapsed, 1), name, value) for name, value in metrics.items())
                csv.writer(file).writerows(rows)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


class ExpertData:
    """Endless batches of expert trajectories; each batch holds episodes of similar length (less padding).

    Always fresh ones; the ant's are spliced from strides, as far as `ant_spliced` says so, and each time turned.
    """

    def __init__(self, run: Run, rng: np.random.Generator, batch: int):
        self.run, self.rng, self.batch = run, rng, batch
        self.queue: list = []

    def next(self):
        c, world = self.run.config, self.run.world
        if not self.queue:
            pool = self.batch * (8 if world.ant else max(1, 4096 // self.batch))
            noise = c.noise if self.run.phase == "pretrain" else 0.0  # else clean, as in the paper
            spliced = world.ant and self.rng.random() < c.ant_spliced
            if spliced:
                episodes = spliced_episodes(self.run, pool, self.rng)
            elif world.ant:  # as many jumps per second as in the spliced ones
                options = c.noise, c.displace / envs.STRIDE, c.on_colour, min(world.limit, envs.STRIDE * c.ant_steps)
                episodes = ant_episodes(self.run, world.pretrain, pool, self.rng, *options)[0]
            else:
                options = noise, c.displace, c.on_colour
                episodes = envs.expert_episodes(world, world.pretrain, pool, self.rng, *options)[0]
            order = np.argsort(episodes.mask.sum(axis=1), kind="stable").reshape(-1, self.batch)
            self.queue = [episodes.take(order[i]) for i in self.rng.permutation(len(order))]
        episodes = self.queue.pop()
        if world.ant:
            episodes = episodes.turned(world, *self.rng.integers(4, size=(2, self.batch)))
        return episodes


def spliced_episodes(run: Run, count: int, rng) -> envs.AntEpisodes:
    """The ant's expert in time-lapse. The strides are the same for every seed, as are the held-out episodes."""
    c, world = run.config, run.world
    if run.strides is None:
        fixed = np.random.default_rng(10**9 + STREAMS["pretrain"])
        run.strides = envs.ant_strides(16_384, fixed, c.noise, torch.get_num_threads())
    elsewhere, short = (0.0, c.ant_short) if run.phase == "pretrain" else (c.elsewhere, 0.0)
    jumps = 0.0 if elsewhere else c.displace
    whole, pause = (c.ant_whole, c.ant_pause) if run.phase == "discover" else (0, 0.0)
    options = jumps, c.on_colour, elsewhere, short, pause, whole > 0
    return envs.ant_spliced_episodes(world, world.pretrain, count, whole or c.ant_steps, run.strides, rng, *options)


def ant_episodes(run: Run, tasks, count: int, rng, *options):
    """The ant's expert with as many threads as PyTorch has."""
    return envs.ant_expert_episodes(run.world, tasks, count, rng, *options, threads=torch.get_num_threads())


def held_out(run: Run) -> envs.Episodes:
    """Expert trajectories for evaluation: clean, the same for every seed, never trained on."""
    if not run.test_episodes:
        rng = np.random.default_rng(10**9 + STREAMS["test"])
        tasks, count = run.world.pretrain, run.config.eval_episodes
        if run.world.ant:  # without noise the torques are a little too regular
            run.test_episodes = ant_episodes(run, tasks, count, rng, run.config.noise)[0]
        else:
            run.test_episodes = envs.expert_episodes(run.world, tasks, count, rng)[0]
    return run.test_episodes


def action_nll(base: BaseModel, output, episodes, run: Run, soft: bool = True):
    """-ln p(action) of the expert under the head's output, expected over its choice (soft) or for the one it took.

    (B, T) nats, 0 in padding. The ant's expert has one choice.
    """
    return base.action_head.nll(output, episodes, run, soft) * run.tensor(episodes.mask)


def expert_entropy(episodes: envs.Episodes) -> float:
    """The expert's own tie-breaking entropy: the loss of one who knows the task, nats per episode; 0 for the ant."""
    if isinstance(episodes, envs.AntEpisodes):
        return 0.0
    p = np.maximum(episodes.expert, 1e-12)
    return float(-(p * np.log(p) * episodes.mask[..., None]).sum() / len(episodes.mask))


def bayes_floor(world: envs.TaskSet, episodes: envs.Episodes) -> float:
    """Loss of the Bayes-optimal predictor, which infers the hidden task from the moves so far, nats per episode."""
    p = np.maximum(envs.bayes_predictor(world, world.pretrain, episodes), 1e-12)
    return float(-(episodes.expert * np.log(p)).sum() / len(episodes.mask))


def cosine(steps: int, floor: float = 0.02, warmup: int = 50):
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""

    def factor(step):
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * fall)

    return factor


def make_optimisers(c: Config, model: nn.Module, lr: float, steps: int):
    """AdamW (paper), or Muon for matrices inside the blocks and AdamW for the rest -> optimisers, schedulers."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2] if c.pretrain_muon else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    if not c.pretrain_muon:
        optimisers = [torch.optim.AdamW(rest, lr=lr, weight_decay=c.weight_decay)]
        return optimisers, [torch.optim.lr_scheduler.ConstantLR(optimisers[0], 1.0)]
    optimisers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3 * lr, weight_decay=c.weight_decay),  # embeddings and head like it faster
    ]
    return optimisers, [torch.optim.lr_scheduler.LambdaLR(o, cosine(steps)) for o in optimisers]


def adamw(model: nn.Module, lr: float, steps: int, weight_decay: float = 0.0):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(steps))


def update(model: nn.Module, loss, optimisers, schedulers) -> None:
    """One gradient step of `model` with its gradient's norm clipped to 1."""
    loss.backward()
    if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        raise Failure("the gradient is not a finite number; lower the learning rate of this phase", 1)
    for stepper in (*optimisers, *schedulers):
        stepper.step()
    model.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------
# Phase 1: pretrain the base model (paper: App. C.1)
# ----------------------------------------------------------------------------------------------------


def random_memory(c: Config, shape, generator):
    """keep (B, T) for pretraining: each episode draws a rate of forgetting, each step forgets at that rate."""
    B, T = shape
    device = generator.device
    rates = torch.tensor(c.forget, device=device)[
        torch.randint(len(c.forget), (B, 1), generator=generator, device=device)
    ]
    return 1 - 2 * (torch.rand(B, T, generator=generator, device=device) < rates).float()


def pretrain_loss(run: Run, base: BaseModel, episodes: envs.Episodes, keep, keep_lower):
    """sum_t -ln p(a_t | o_1:t) - lambda ln p(o_t+1 | o_1:t), mean over episodes, nats -> (loss, stats)."""
    c = run.config
    cells = run.tensor(episodes.inputs())
    residual, _ = base.lower(cells[:, :-1], keep_lower)
    if not c.obs_loss:
        nll = action_nll(base, base.upper(residual, keep)[0], episodes, run, c.soft_targets).sum(1).mean()
        return nll, {"nll": nll.item()}
    x, _ = base._run(range(c.control_block, c.layers), residual, keep, None)
    x = base.norm(x)
    nll = action_nll(base, base.action_head(x), episodes, run, c.soft_targets).sum(1).mean()
    guess = base.next_head(x)
    if run.world.ant:  # a Gaussian of standard deviation 1, without its constant
        surprise = 0.5 * (guess - cells[:, 1:]).square().sum(-1)
    else:
        surprise = F.cross_entropy(guess.transpose(1, 2), cells[:, 1:, -1], reduction="none")
    surprise = (surprise * run.tensor(episodes.mask)).sum(1).mean()
    return nll + c.obs_loss * surprise, {"nll": nll.item(), "obs_nll": surprise.item()}


def pretrain(run: Run) -> tuple[BaseModel, dict]:
    """Train the base model on the expert's actions -> (base, {"base_excess_nats", ...})."""
    c = run.config
    rng, generator = run.start("pretrain")
    base = BaseModel(c).to(run.device)
    data = ExpertData(run, rng, c.pretrain_batch)
    test = held_out(run)
    optimisers, schedulers = make_optimisers(c, base, c.pretrain_lr, c.pretrain_steps)
    for step in range(1, c.pretrain_steps + 1):
        episodes = data.next()
        keep = random_memory(c, episodes.mask.shape, generator)
        # The controller will sit on a lower part without memory, so a third of the episodes trains that.
        blind = torch.rand(len(keep), 1, generator=generator, device=run.device) < 0.3
        keep_lower = keep.masked_fill(blind, -1) if c.memory != "full" else keep
        loss, stats = pretrain_loss(run, base, episodes, keep, keep_lower)
        length = episodes.mask.sum() / len(episodes.mask)
        update(base, loss / length, optimisers, schedulers)
        if step % 50 == 0 or step == c.pretrain_steps:
            run.log(
                step, c.pretrain_steps, "steps", nats_per_episode=stats["nll"], nats_per_step=stats["nll"] / length
            )
    base.requires_grad_(False)
    metrics = {"base_nll_nats": base_loss(run, base, test, keep=1.0), "minutes_pretrain": run.seconds() / 60}
    check_finite("pretrain", **metrics)
    return base, metrics | (ant_metrics(run, base) if run.world.ant else bayes_metrics(run, test, metrics))


def bayes_metrics(run: Run, test: envs.Episodes, metrics: dict) -> dict:
    """Grid: how far the base is from the best possible predictor."""
    floor = bayes_floor(run.world, test)
    excess = metrics["base_nll_nats"] - floor
    run.say(f"base: {excess:.3f} nats per episode above the Bayes floor of {floor:.2f}")
    return {"base_excess_nats": excess, "bayes_floor_nats": floor}


def ant_metrics(run: Run, base: BaseModel) -> dict:
    """Ant: the expert's success, and whether the base left alone walks: a clone may look perfect and stand still."""
    c = run.config
    rng, generator = run.start("evaluate")
    result = rollout(run, base, RawPilot(), c.eval_episodes, rng, generator)
    metrics = {"base_reach": float((result.visits > 0).mean())}
    for name, tasks in (("expert_success", run.world.pretrain), ("expert_post_success", [run.world.post])):
        metrics[name] = ant_episodes(run, tasks, c.eval_episodes, rng, c.noise)[2]
    run.say("ant: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    return metrics


@torch.no_grad()
def base_loss(run: Run, base: BaseModel, episodes: envs.Episodes, keep: float) -> float:
    """Nats per episode of the base left alone, with full memory (keep=1) or none (keep=-1)."""
    total = 0.0
    for part in np.array_split(np.arange(len(episodes.mask)), max(1, len(episodes.mask) // 256)):
        chunk = episodes.take(part)
        kept = torch.full(chunk.mask.shape, keep, device=run.device)
        total += action_nll(base, base(run.tensor(chunk.inputs()[:, :-1]), kept), chunk, run).sum().item()
    return total / len(episodes.mask)


def subgoals(world: envs.TaskSet, episodes: envs.Episodes) -> tuple[np.ndarray, np.ndarray]:
    """True subgoal (N, T), -1 in the padding, and where it changes (N, T) bool, never at the first step."""
    subgoal = np.append(world.subgoal_of_colour(), -1)[episodes.goal]
    changed = np.zeros(subgoal.shape, dtype=bool)
    changed[:, 1:] = (subgoal[:, 1:] != subgoal[:, :-1]) & episodes.mask[:, 1:]
    return subgoal, changed


def fit_readout(run: Run, inputs, labels, hidden: int = 0, steps: int = 300) -> float:
    """Held-out accuracy of a linear (hidden=0) or small MLP read-out; the second half is held out.

    inputs (N, F), labels (N,). The halves must not share episodes: that is the caller's order.
    """
    half = len(inputs) // 2
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        inputs = (inputs - inputs[:half].mean(0)) / (inputs[:half].std(0) + 1e-6)
        sizes = [inputs.shape[1], *([hidden] if hidden else []), int(labels.max()) + 1]
        layers = [m for a, b in zip(sizes[:-1], sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
        net = nn.Sequential(*layers).to(run.device)
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(steps):
            loss = F.cross_entropy(net(inputs[:half]), labels[:half])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return (net(inputs[half:]).argmax(-1) == labels[half:]).float().mean().item()


@torch.no_grad()
def probe(run: Run, base: BaseModel) -> list[float]:
    """Accuracy of a linear probe of the true subgoal on the residual after the embedding and each block."""
    episodes = held_out(run)
    subgoal, _ = subgoals(run.world, episodes)
    mask = run.tensor(episodes.mask)
    keep = torch.ones(episodes.mask.shape, device=run.device)
    streams = base.residuals(run.tensor(episodes.inputs()[:, :-1]), keep)
    labels = run.tensor(subgoal)[mask]
    return [fit_readout(run, stream[mask], labels) for stream in streams]


# ----------------------------------------------------------------------------------------------------
# Check: can the frozen base be steered at all? One controller per ground-truth subgoal (paper: Fig. 4)
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def lower_residual(run: Run, base: BaseModel, cells):
    """The residual that is controlled, (B, T, D): the lower blocks have memory only where memory = full."""
    keep = torch.full(cells.shape[:2], 1.0 if run.config.memory == "full" else -1.0, device=run.device)
    return base.lower(cells, keep)[0]


def mean_residual(run: Run, base: BaseModel):
    """Mean of the controlled residual over expert data (D,), or 0 where control is not centred."""
    c = run.config
    if not c.centred:
        return torch.zeros(c.dim, device=run.device)
    if run.world.ant and c.ant_spliced:
        episodes = spliced_episodes(run, 256, np.random.default_rng(10**9 + STREAMS["test"]))
    else:
        episodes = held_out(run)
    return lower_residual(run, base, run.tensor(episodes.inputs()[:, :-1]))[run.tensor(episodes.mask)].mean(0)


def steer(run: Run, base: BaseModel) -> tuple[Labels, dict]:
    """Train ground-truth controllers on pretraining tasks, then switch them by hand on the post-training task."""
    c = run.config
    rng, generator = run.start("steer")
    labels = Labels(c, mean_residual(run, base), len(run.world.subgoals)).to(run.device)
    data = ExpertData(run, rng, c.steer_batch)
    optimiser, scheduler = adamw(labels, c.steer_lr, c.steer_steps)
    for step in range(1, c.steer_steps + 1):
        episodes = data.next()
        subgoal, changed = subgoals(run.world, episodes)
        residual = lower_residual(run, base, run.tensor(episodes.asked))
        controller = labels.controller(run.tensor(np.maximum(subgoal, 0)))
        keep = memory_after(run.tensor(changed).float(), c.memory)
        logits, _ = base.upper(apply_controller(residual, controller, labels.mean), keep)
        loss = action_nll(base, logits, episodes, run).sum(1).mean()
        update(labels, loss / episodes.mask.shape[1], [optimiser], [scheduler])
        if step % 50 == 0 or step == c.steer_steps:
            run.log(step, c.steer_steps, "steps", excess=loss.item() - expert_entropy(episodes))
    result = rollout(run, base, LabelPilot(labels), c.eval_episodes, rng, generator)
    run.say(f"ground-truth controllers: post-training success {result.reward.mean():.3f}")
    return labels, {
        "steer_success": result.reward.mean().item(),
        "steer_visits": result.visits.mean(),
        "minutes_steer": run.seconds() / 60,
    }


# ----------------------------------------------------------------------------------------------------
# Rollouts: the base model acts in the environment, and a pilot may steer its residual stream
# ----------------------------------------------------------------------------------------------------


class RawPilot:
    """No control: the base model left alone, with its full memory."""

    memory = "full"

    def begin(self, B: int, run: Run) -> None:
        self.opened = torch.zeros(B, device=run.device)

    def steer(self, residual, batch, alive):
        """residual (B, D) -> controlled residual (B, D), opened gates (B,)."""
        return residual, self.opened[: len(residual)]

    def select(self, kept) -> None:
        pass


class LabelPilot:
    """Ground-truth controllers, switched by hand when the true subgoal changes."""

    def __init__(self, labels: Labels):
        self.labels = labels

    def begin(self, B: int, run: Run) -> None:
        self.run, self.memory = run, run.config.memory
        self.subgoal = torch.full((B,), -1, device=run.device)

    def steer(self, residual, batch, alive):
        subgoal = self.run.tensor(batch.subgoal())
        opened = (subgoal != self.subgoal).float()
        self.subgoal = subgoal
        return apply_controller(residual, self.labels.controller(subgoal), self.labels.mean), opened

    def select(self, kept) -> None:
        self.subgoal = self.subgoal[kept]


class CodePilot:
    """The metacontroller in phase 3: `choose` gives a new code where the gate opens, else the code is held.

    The gate is H(beta_t - threshold); at the first step it is open. (Alg. 1)
    """

    def __init__(self, meta: Metacontroller, choose):
        self.meta, self.choose = meta, choose

    def begin(self, B: int, run: Run) -> None:
        c, device = run.config, run.device
        self.threshold, self.memory = c.rl_threshold, c.memory
        self.history = torch.zeros(1, B, c.history_dim, device=device)
        self.code = torch.zeros(B, c.code_dim, device=device)
        self.out = torch.zeros(B, c.rank, c.dim, device=device)  # the controller in force, decoded once a switch
        self.inn = torch.zeros(B, c.rank, c.dim, device=device)
        self.first = True
        self.choose.begin(B, run)

    def steer(self, residual, batch, alive):
        opened = self.meta.gate(residual, self.history[0], self.code) > self.threshold
        opened |= self.first
        self.first = False
        if opened.any():
            self.code[opened] = self.choose(residual[opened], opened, alive)
            self.out[opened], self.inn[opened] = self.meta.controller(self.code[opened])
        _, self.history = self.meta.history(residual[:, None], self.history)
        return apply_controller(residual, (self.out, self.inn), self.meta.mean), opened.float()

    def select(self, kept) -> None:
        self.history = self.history[:, kept]
        self.code, self.out, self.inn = self.code[kept], self.out[kept], self.inn[kept]
        self.choose.select(kept)


class PriorCodes:
    """Codes drawn from the prior N(0, I): what exploration looks like before any learning."""

    def __init__(self, generator):
        self.generator = generator

    def begin(self, B: int, run: Run) -> None:
        self.size = run.config.code_dim

    def __call__(self, residual, opened, alive):
        shape = len(residual), self.size
        return torch.randn(shape, generator=self.generator, device=residual.device)

    def select(self, kept) -> None:
        pass


class Result(NamedTuple):
    """N finished episodes."""

    reward: torch.Tensor  # (N,)
    visited: np.ndarray  # (N, T) colour visited by each step, else -1
    switched: np.ndarray  # (N, T) open gates
    inputs: np.ndarray  # (N, T, O + W + 1) | (N, T, F) observations, empty unless recorded
    actions: torch.Tensor  # (N, T) | (N, T, 8), empty unless recorded
    log_prob: torch.Tensor  # (N, T) of the sampled actions
    mask: np.ndarray  # (N, T) steps that were lived
    steps: int  # model steps computed: the sum of the mask, since the dead are dropped

    @property
    def visits(self) -> np.ndarray:
        """Visits per episode, (N,)."""
        return (self.visited >= 0).sum(axis=1)


def join_results(parts: list[Result]) -> Result:
    """Chunks of episodes -> one Result, padded to the longest."""
    T = max(part.mask.shape[1] for part in parts)

    def pad(value, fill):
        if not value.shape[1]:  # not recorded
            return value
        if isinstance(value, np.ndarray):
            return np.pad(value, [(0, 0), (0, T - value.shape[1])] + [(0, 0)] * (value.ndim - 2), constant_values=fill)
        return F.pad(value, [0, 0] * (value.ndim - 2) + [0, T - value.shape[1]], value=fill)

    columns = {name: [getattr(part, name) for part in parts] for name in Result._fields}
    joined = {"reward": torch.cat(columns["reward"]), "steps": sum(columns["steps"])}
    for name, fill in (("visited", -1), ("switched", 0), ("inputs", 0), ("mask", 0)):
        joined[name] = np.concatenate([pad(value, fill) for value in columns[name]])
    for name in ("actions", "log_prob"):
        joined[name] = torch.cat([pad(value, 0) for value in columns[name]])
    return Result(**joined)


def rollout(
    run: Run, base: BaseModel, pilot, count: int, rng, generator, temperature=1.0, record=False, roam=False, chunk=2048
) -> Result:
    """`count` episodes of the post-training task on random solvable layouts.

    temperature scales the base's action logits; record keeps observations; roam lets wrong visits pass (for
    counting transitions). Episodes step together and are dropped when they end: cost follows the living. Chunks
    keep the working set in the processor's cache.
    """
    parts = []
    for start in range(0, count, chunk):
        B = min(chunk, count - start)
        layout, _, _, _ = envs.solvable_layouts(run.world, [run.world.post], B, rng)
        batch = envs.make_batch(run.world, layout, [run.world.post] * B, rng, roam, torch.get_num_threads())
        parts.append(_rollout_chunk(run, base, pilot, batch, generator, temperature, record))
    return join_results(parts)


@torch.no_grad()
def _rollout_chunk(run: Run, base: BaseModel, pilot, batch, generator, temperature, record) -> Result:
    B, T = len(batch), run.world.limit
    visited = np.full((B, T), -1, dtype=np.int8)
    switched, mask = np.zeros((B, T), dtype=bool), np.zeros((B, T), dtype=bool)
    inputs, actions = [], []
    log_prob, reward = torch.zeros(B, T, device=run.device), torch.zeros(B, device=run.device)
    alive, state = np.arange(B), base.initial(B)
    pilot.begin(B, run)
    for t in range(T):
        seen = batch.inputs()
        rows = run.tensor(alive)
        keep_lower = torch.full((len(alive), 1), 1.0 if pilot.memory == "full" else -1.0, device=run.device)
        residual, state = base.lower(run.tensor(seen)[:, None], keep_lower, state)
        controlled, opened = pilot.steer(residual[:, 0], batch, alive)
        keep = (1 - opened)[:, None] if pilot.memory == "segment" else keep_lower
        output, state = base.upper(controlled[:, None], keep, state)
        if not output.isfinite().all():
            raise Failure(f"{run.phase}: the model's actions are no numbers; lower the learning rate", 1)
        action = base.action_head.sample(output[:, 0], temperature, generator)
        visit, gain, done = batch.step(action.cpu().numpy())
        visited[alive, t], switched[alive, t], mask[alive, t] = visit, opened.bool().cpu().numpy(), True
        if record:
            inputs.append(np.zeros((B, *seen.shape[1:]), dtype=seen.dtype))
            actions.append(action.new_zeros(B, *action.shape[1:]))
            inputs[t][alive], actions[t][rows] = seen, action
            log_prob[rows, t] = base.action_head.log_prob(output[:, 0], action, temperature)
        reward[rows] += run.tensor(gain)
        if done.any():  # drop the dead
            alive, kept = alive[~done], run.tensor(~done)
            batch.select(~done)
            pilot.select(kept)
            state = [tuple(part[kept] for part in block) for block in state]
        if not len(alive):
            break
    T = t + 1
    return Result(
        reward,
        visited[:, :T],
        switched[:, :T],
        np.stack(inputs, axis=1) if record else np.zeros((B, 0)),
        torch.stack(actions, dim=1) if record else torch.zeros(B, 0),
        log_prob[:, :T],
        mask[:, :T],
        int(mask.sum()),
    )


# ----------------------------------------------------------------------------------------------------
# Phase 2: discover controllers and when to switch them (paper: Sec. 3, App. D.2, Eq. 3)
# ----------------------------------------------------------------------------------------------------


def mirrored(run: Run, episodes: envs.Episodes, generator):
    """The observations of a rotated or reflected copy of each episode, (B, T + 1, O + W + 1).

    A mirrored expert episode is as likely as the episode itself, but its headings and places are different ones:
    a code read off it can name a colour, not a direction. This is what makes codes mean subgoals.
    """
    if not run.config.mirror:
        return run.tensor(episodes.inputs())
    if run.world.ant:
        turns, legs = torch.randint(4, (2, len(episodes.mask)), generator=generator, device=run.device).cpu().numpy()
        view = envs.turn_ant(run.world, episodes.inputs(), turns, legs)
        view[..., : envs.ant_slices(run.world)["xy"].start] = 0  # no body: nothing for a code to be relative to
        return run.tensor(view)
    cells = run.tensor(episodes.inputs())
    table = run.tensor(envs.mirror_table(run.world.size))
    symmetry = torch.randint(len(table), (len(cells), 1, 1), generator=generator, device=run.device)
    return table[symmetry, cells]


def posterior(run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, generator, brief=False):
    """What the encoder makes of a mirrored copy of the episodes: mean, log_std of the proposals, (B, T, Z).

    brief: it reads only the steps that lead into another cell, and those between take over their proposal. The spliced
    ants that it has learned from enter a cell with most of their steps, a simulated one with every 60th.
    """
    view, length = lower_residual(run, base, mirrored(run, episodes, generator)), run.tensor(episodes.lengths())
    if not brief:
        return meta.encode(view, length)
    cell = base.embed.places(run.tensor(episodes.inputs()))[..., -1, :].floor()
    step = torch.arange(cell.shape[1], device=run.device)
    entry = ((cell != shift_right(cell)).any(-1) | (step == 0)) & (step < length[:, None])
    number, count = entry.cumsum(1) - 1, entry.sum(1)  # of the entry that each step belongs to
    entries = length[:, None].repeat(1, int(count.max()) + 1)  # the last observation closes each sequence
    rows, steps = torch.nonzero(entry, as_tuple=True)
    entries[rows, number[entry]] = steps
    parts = meta.encode(view.gather(1, entries[..., None].expand(-1, -1, view.shape[-1])), count)
    return tuple(part.gather(1, number[:, :-1, None].expand(-1, -1, meta.code_dim)) for part in parts)


def discovery_loss(
    run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, generator, kl_weight, stage
):
    """sum_t -ln p(a_t | o_1:t, z_1:t) + alpha KL_t, mean over episodes, nats -> (loss, stats). Eq. 3.

    The KL is charged at every step, as in the paper, or where the gate opens (`kl_at_switches`). Gradients
    flow through the frozen upper blocks. The gate and the encoder see the trajectory; the base is steered where the
    expert was asked, which is somewhere else for a share `elsewhere` of the actions: a heading would not help there,
    the subgoal does. stage: "free" is the paper's loss; "held", codes serve a minimal time and
    no gradient reaches the gate through what the base remembers, or it would stay shut to keep memory before there
    are codes worth switching to; "blind", the base has no memory at all, so that the code must say everything.
    """
    c = run.config
    mask = run.tensor(episodes.mask)
    residual = lower_residual(run, base, run.tensor(episodes.inputs()[:, :-1]))
    mean, log_std = posterior(run, base, meta, episodes, generator)
    noise = torch.randn(mean.shape, generator=generator, device=run.device)
    hold = None
    if c.hold and stage == "held":
        hold = torch.randint(c.hold + 1, (len(mask),), generator=generator, device=run.device)
    code, gate = meta.integrate(residual, mean + torch.exp(log_std) * noise, hold)
    keep = memory_after(gate if stage == "free" else gate.detach(), "none" if stage == "blind" else c.memory)
    if c.elsewhere:
        residual = lower_residual(run, base, run.tensor(episodes.asked))
    logits, _ = base.upper(apply_controller(residual, meta.controller(code), meta.mean), keep)
    nll = action_nll(base, logits, episodes, run, c.soft_targets).sum(1).mean()
    # In proportion to the gate a half-open one would get its code at half the price, and gates would stay soft
    price = mask * gate * (1 + 0.5 * (1 - gate)) if c.kl_at_switches else mask
    kl = (code_kl(mean, log_std) * price).sum(1).mean()
    stats = {"nll": nll.item(), "kl": kl.item(), "gates": (gate * mask).sum(1).mean().item() - 1}
    return nll + kl_weight * kl, stats


def discover(run: Run, base: BaseModel) -> tuple[Metacontroller, dict]:
    """Train the metacontroller on the frozen base, then measure switches and codes -> (meta, metrics)."""
    c = run.config
    rng, generator = run.start("discover")
    meta = Metacontroller(c, mean_residual(run, base)).to(run.device)
    data = ExpertData(run, rng, c.discover_batch)
    optimiser, scheduler = adamw(meta, c.discover_lr, c.discover_steps)
    first, last = c.kl_ramp
    for step in range(1, c.discover_steps + 1):
        episodes = data.next()
        kl_weight = c.kl_weight * min(1.0, max(0.0, (step - first) / (last - first)))
        stage = "blind" if step <= c.discover_blind else "held" if step <= c.discover_held else "free"
        loss, stats = discovery_loss(run, base, meta, episodes, generator, kl_weight, stage)
        update(meta, loss / 10, [optimiser], [scheduler])
        if step % 50 == 0 or step == c.discover_steps:
            stats["excess"] = stats.pop("nll") - expert_entropy(episodes)
            run.log(step, c.discover_steps, "steps", **stats)
    meta.requires_grad_(False)
    minutes = run.seconds() / 60
    metrics = {**switch_metrics(run, base, meta), **random_code_metrics(run, base, meta), "minutes_discover": minutes}
    for line in raster(run, base, meta):
        run.say(line)
    return meta, metrics


def share_near(marks: np.ndarray, others: np.ndarray, tolerance: int = 1) -> float:
    """Share of `marks` (N, T) with one of `others` at most `tolerance` steps away; 0 where there are none."""
    wide = np.pad(others, ((0, 0), (tolerance, tolerance)))
    near = np.lib.stride_tricks.sliding_window_view(wide, 2 * tolerance + 1, axis=1).any(axis=-1)
    return float((marks & near).sum() / max(1, marks.sum()))


def simulated(run: Run) -> bool:
    """Whether held-out episodes, which are simulated, have another pace than those that were learned from."""
    return run.world.ant and run.config.ant_spliced > 0


@torch.no_grad()
def hard_codes(run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, generator):
    """Codes and gates with the gate rounded as in phase 3, and the KL: (B, T, Z), (B, T), (B, T)."""
    residual = lower_residual(run, base, run.tensor(episodes.inputs()[:, :-1]))
    mean, log_std = posterior(run, base, meta, episodes, generator, brief=simulated(run))
    noise = torch.randn(mean.shape, generator=generator, device=run.device)
    code, gate = meta.integrate(residual, mean + torch.exp(log_std) * noise, hard=True)
    return code, gate, code_kl(mean, log_std)


@torch.no_grad()
def switch_metrics(run: Run, base: BaseModel, meta: Metacontroller) -> dict:
    """Switches against true subgoal changes (+-1 step, ant: +-5; first step excluded), and what the codes mean.

    Beside them a random switcher of the same rate, and the read-out of the true subgoal and of the expert's next
    action from the code at a switch, by a small MLP, on layouts it has not seen.
    """
    rng, generator = run.start("evaluate")
    episodes = held_out(run)
    subgoal, changed = subgoals(run.world, episodes)
    code, gate, kl = hard_codes(run, base, meta, episodes, generator)
    adopted = (gate > 0.5).cpu().numpy() & episodes.mask
    switched = adopted.copy()
    switched[:, 0] = False
    later = episodes.mask.copy()
    later[:, 0] = False
    by_chance = (rng.random(later.shape) < switched.sum() / later.sum()) & later
    at = run.tensor(adopted)
    tolerance = 5 if run.world.ant else 1
    metrics = {
        "switch_precision": share_near(switched, changed, tolerance),
        "switch_recall": share_near(changed, switched, tolerance),
        "random_switch_precision": share_near(by_chance, changed, tolerance),
        "random_switch_recall": share_near(changed, by_chance, tolerance),
        "switches_per_episode": float(switched.sum() / len(switched)),
        "true_changes_per_episode": float(changed.sum() / len(changed)),
        "kl_per_switch_nats": (kl * at).sum().item() / adopted.sum(),
        "code_accuracy": fit_readout(run, code[at], run.tensor(subgoal)[at], hidden=64),
    }
    if not run.world.ant:
        best = run.tensor(episodes.expert.argmax(-1))
        metrics["action_from_code_accuracy"] = fit_readout(run, code[at], best[at], hidden=64)
    return metrics


def random_code_metrics(run: Run, base: BaseModel, meta: Metacontroller) -> dict:
    """Codes drawn from the prior: do they reach transitions that pretraining never showed, and the final task?"""
    c = run.config
    rng, generator = run.start("evaluate")
    pilot = CodePilot(meta, PriorCodes(generator))
    roaming = rollout(run, base, pilot, c.eval_episodes, rng, generator, c.rl_temperature, roam=True)
    table = transition_table(run.world, roaming.visited)
    unseen = sorted(run.world.transitions(run.world.post))
    trials = rollout(run, base, pilot, c.random_episodes, rng, generator, c.rl_temperature)
    metrics = {
        "unseen_transition_probability": float(np.mean([table[a, b] for a, b in unseen])),
        "random_code_success": trials.reward.mean().item(),
        "counting_success": run.world.counting_success,
    }
    run.say("random codes: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics


def transition_table(world: envs.TaskSet, visited: np.ndarray) -> np.ndarray:
    """p(next subgoal b | subgoal a was just completed) from roaming episodes: (subgoals, subgoals + 1).

    visited (N, T) holds the colour visited by each step or -1. A subgoal is completed when its colours are visited
    one after the other; the last column counts what completes none.
    """
    n, length = len(world.subgoals), len(world.subgoals[0])
    counts = np.zeros((n, n + 1))
    for row in visited:
        sequence = row[row >= 0]
        for i in range(len(sequence) - 2 * length + 1):
            before, after = tuple(sequence[i : i + length]), tuple(sequence[i + length : i + 2 * length])
            if before in world.subgoals:
                a = world.subgoals.index(before)
                counts[a, world.subgoals.index(after) if after in world.subgoals else n] += 1
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def raster(run: Run, base: BaseModel, meta: Metacontroller, count: int = 3) -> list[str]:
    """Lines for the terminal: true subgoals over switch marks (|), for a few held-out episodes."""
    _, generator = run.start("figures")
    episodes = held_out(run).take(np.arange(count))
    subgoal, _ = subgoals(run.world, episodes)
    _, gate, _ = hard_codes(run, base, meta, episodes, generator)
    lines = []
    for i in range(count):
        steps = episodes.mask[i].sum()
        lines.append("true subgoal  " + "".join(str(g) for g in subgoal[i, :steps]))
        lines.append("gate opens    " + "".join("|" if g > 0.5 else "." for g in gate[i, :steps]))
    return lines


# ----------------------------------------------------------------------------------------------------
# Phase 3: internal RL, and RL on raw actions through the same loop (paper: App. C.5, Algorithms 1-3)
# ----------------------------------------------------------------------------------------------------


class Contracted(nn.Module):
    """One recurrent block on contracted time: its state advances only at switches. (App. C.5)"""

    def __init__(self, c: Config):
        super().__init__()
        self.inp = nn.Linear(c.dim, c.policy_dim)
        self.block = Block(replace(c, block="hawk", dim=c.policy_dim, mlp=2 * c.policy_dim, gated_mlp=True))
        self.norm = nn.RMSNorm(c.policy_dim)

    def initial(self, B: int):
        return self.block.mixer.initial(B)

    def forward(self, residual, state=None):
        """residual (B, K, D) at K successive switches -> features (B, K, policy_dim), state."""
        state = self.initial(len(residual)) if state is None else state
        keep = torch.ones(residual.shape[:2], device=residual.device)
        x, state = self.block(self.inp(residual), keep, state)
        return self.norm(x), state


class Policy(nn.Module):
    """Causal policy over codes: a Gaussian, at first the codes' prior: mean 0, standard deviation `policy_std`."""

    def __init__(self, c: Config):
        super().__init__()
        self.body = Contracted(c)
        self.mean = nn.Linear(c.policy_dim, c.code_dim)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        self.log_std = nn.Parameter(torch.full((c.code_dim,), math.log(c.policy_std)))

    def forward(self, residual, state=None):
        """residual (B, K, D) at K successive switches -> mean (B, K, Z), log_std (Z,), state."""
        features, state = self.body(residual, state)
        return self.mean(features), self.log_std, state


class Critic(nn.Module):
    """Chance of success, as a logit, at a switch, before its code is chosen. It starts where RL does: near 0."""

    def __init__(self, c: Config):
        super().__init__()
        self.body = Contracted(c)
        self.value = nn.Linear(c.policy_dim, 1)
        nn.init.constant_(self.value.bias, -5.0)

    def forward(self, residual):
        """residual (B, K, D) at all switches of B episodes -> logits (B, K)."""
        return self.value(self.body(residual)[0])[..., 0]


class Batch(NamedTuple):
    """What RL learns from: N episodes of K decisions. For internal RL a decision is a code, for raw RL an action."""

    inputs: torch.Tensor  # (N, K, D) residual at the switch | (N, K, O + W + 1) observation
    chosen: torch.Tensor  # (N, K, Z) code | (N, K) action
    log_prob: torch.Tensor  # (N, K) when it was chosen
    mask: torch.Tensor  # (N, K) decisions that were made
    reward: torch.Tensor  # (N,) terminal


class PolicyCodes:
    """Codes sampled from the policy, remembered with their log-probabilities: one entry per switch, no more.

    Without `sample` they are the means of the policy, only to evaluate it.
    """

    def __init__(self, policy: Policy, generator, most: int, sample: bool = True):
        self.policy, self.generator, self.most, self.sample, self.chunks = policy, generator, most, sample, []

    def begin(self, B: int, run: Run) -> None:
        self.state = self.policy.body.initial(B)
        self.entries = []
        self.chunks.append((B, self.entries))

    def __call__(self, residual, opened, alive):
        mean, log_std, state = self.policy(residual[:, None], tuple(part[opened] for part in self.state))
        for part, new in zip(self.state, state):
            part[opened] = new
        mean = mean[:, 0]
        noise = torch.randn(mean.shape, generator=self.generator, device=mean.device)
        code = mean + torch.exp(log_std) * noise if self.sample else mean  # Alg. 2: z ~ pi(z | e_t, own state)
        rows = torch.from_numpy(alive).to(mean.device)[opened]
        self.entries.append((rows, residual, code, gaussian_log_prob(code, mean, log_std)))
        return code

    def select(self, kept) -> None:
        self.state = tuple(part[kept] for part in self.state)

    def batch(self, reward) -> Batch:
        """All chunks since construction, in contracted time: decision k of an episode is its k-th switch.

        Only the first `most` decisions are kept: an agent that walks in circles may switch at every step.
        """
        sizes = [B for B, _ in self.chunks]
        starts = np.cumsum([0, *sizes[:-1]])
        rows = torch.cat([r + start for (_, entries), start in zip(self.chunks, starts) for r, *_ in entries])
        residual, code, log_prob = (
            torch.cat([entry[i] for _, entries in self.chunks for entry in entries]) for i in (1, 2, 3)
        )
        order = torch.argsort(rows, stable=True)
        counts = torch.bincount(rows, minlength=sum(sizes))
        first = torch.cumsum(counts, 0) - counts
        index = torch.arange(len(rows), device=rows.device) - first[rows[order]]
        order, index = order[index < self.most], index[index < self.most]

        def spread(values):
            table = values.new_zeros(len(counts), min(self.most, int(counts.max())), *values.shape[1:])
            table[rows[order], index] = values[order]
            return table

        return Batch(spread(residual), spread(code), spread(log_prob), spread(torch.ones_like(log_prob)), reward)


class InternalLearner:
    """RL inside the model: base, metacontroller and gate are frozen, the policy over codes learns."""

    def __init__(self, run: Run, base: BaseModel, meta: Metacontroller, policy: Policy):
        self.run, self.base, self.meta, self.model = run, base, meta, policy
        others = [parameter for name, parameter in policy.named_parameters() if name != "log_std"]
        std = {"params": [policy.log_std], "lr": run.config.rl_std_lr}
        self.optimiser = torch.optim.Adam([{"params": others}, std], lr=run.config.rl_lr)
        self.critic = Critic(run.config).to(run.device) if run.config.rl_lambda < 1 else None

    def collect(self, count: int, rng, generator, sample: bool = True) -> Batch:
        codes = PolicyCodes(self.model, generator, self.run.config.rl_decisions, sample)
        pilot = CodePilot(self.meta, codes)
        result = rollout(self.run, self.base, pilot, count, rng, generator, self.run.config.rl_temperature)
        return codes.batch(result.reward)

    def log_prob(self, inputs, chosen):
        mean, log_std, _ = self.model(inputs)
        return gaussian_log_prob(chosen, mean, log_std)


class RawLearner:
    """The baseline: the same objective, without a critic, fine-tunes the base itself; a decision is a raw action."""

    def __init__(self, run: Run, base: BaseModel):
        self.run, self.model, self.critic = run, base, None
        self.optimiser = torch.optim.Adam([p for p in base.parameters() if p.requires_grad], lr=run.config.raw_lr)

    def collect(self, count: int, rng, generator) -> Batch:
        result = rollout(self.run, self.model, RawPilot(), count, rng, generator, record=True)
        cells, mask = self.run.tensor(result.inputs), self.run.tensor(result.mask).float()
        return Batch(cells, result.actions, result.log_prob, mask, result.reward)

    def log_prob(self, inputs, chosen):
        if len(inputs) <= 32:
            return self._log_prob(inputs, chosen)
        # Many long sequences: recompute the activations in the backward pass, part by part, to save memory.
        parts = zip(inputs.split(32), chosen.split(32))
        return torch.cat([checkpoint(self._log_prob, *part, use_reentrant=False) for part in parts])

    def _log_prob(self, inputs, chosen):
        keep = torch.ones(inputs.shape[:2], device=inputs.device)
        return self.model.action_head.log_prob(self.model(inputs, keep), chosen)


def policy_loss(log_prob, old_log_prob, advantage, mask, clip: float):
    """PPO's clipped ratio, mean over decisions. log_prob, mask (N, K), advantage (N, K or 1) -> scalar."""
    ratio = torch.exp((log_prob - old_log_prob) * mask)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * mask).sum() / mask.sum()


def terminal_advantage(reward):
    """A = (R - mean R) / (std R + 1e-3) over the batch, the same for all decisions of an episode: (N,) -> (N,)."""
    return (reward - reward.mean()) / (reward.std(correction=0) + 1e-3)


def value_loss(logits, reward, mask):
    """Cross-entropy of the critic's chances, mean over decisions: logits, mask (N, K), reward (N,) -> scalar."""
    loss = F.binary_cross_entropy_with_logits(logits, reward[:, None].expand_as(logits), mask, reduction="sum")
    return loss / mask.sum()


def lambda_advantage(value, reward, mask, decay: float):
    """GAE over decisions, normalised: value, mask (N, K), reward (N,) -> (N, K).

    A_k = delta_k + lambda A_{k+1}, delta_k = V_{k+1} - V_k; R takes the place of V after the last decision. A decision
    is judged by where it led rather than by all that its episode did later.
    """
    rows, last = torch.arange(len(value), device=value.device), mask.sum(1).long() - 1
    after = F.pad(value[:, 1:], (0, 1))
    after[rows, last] = reward
    advantage = (after - value) * mask
    for k in reversed(range(mask.shape[1] - 1)):
        advantage[:, k] += decay * advantage[:, k + 1]
    mean = advantage.sum() / mask.sum()
    std = ((advantage - mean).square() * mask).sum().div(mask.sum()).sqrt()
    return (advantage - mean) / (std + 1e-3) * mask


def thin(batch: Batch, failures: int, generator) -> Batch:
    """All successes of a batch and at most so many of its failures, drawn at random.

    What is left has the gradient of the whole in expectation, up to a factor: the advantages of its failures add up to
    minus those of its successes, as they do in the whole.
    """
    failed = torch.nonzero(batch.reward == 0)[:, 0]
    if len(failed) <= failures:
        return batch
    kept = torch.ones_like(batch.reward, dtype=torch.bool)
    kept[failed[torch.randperm(len(failed), generator=generator, device=failed.device)[failures:]]] = False
    return Batch(*(part[kept] for part in batch))


def reinforce(run: Run, phase: str, learner) -> list[tuple[int, float]]:
    """Clipped REINFORCE on one terminal reward -> [(episodes, success of that batch)].

    What is left of PPO, and why: 1. no critic and no GAE: there is one reward, at the end, and its batch mean is
    the baseline. Only internal RL with --rl_lambda below 1 has them: its decisions are few, so a critic soon tells
    which of them led on. 2. no entropy bonus; 3. the clipped ratio stays, as it allows several passes over a batch.
    """
    c = run.config
    rng, generator = run.start(phase)
    curve, episodes, critic = [], 0, learner.critic
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=c.rl_lr) if critic else None
    rates = [group["lr"] for group in learner.optimiser.param_groups]
    while episodes < c.rl_episodes:
        if c.rl_anneal:  # first where the codes should lie, then how precisely: a deviation of 0.1 learns no more
            done = episodes / c.rl_episodes
            for group, rate, factor in zip(learner.optimiser.param_groups, rates, (1 - done, done)):
                group["lr"] = rate * factor
        # collect
        batch = learner.collect(c.rl_batch, rng, generator)
        episodes += c.rl_batch
        curve.append((episodes, batch.reward.mean().item()))
        decisions = batch.mask.sum(1).mean().item()
        if phase == "raw":
            batch = thin(batch, c.raw_failures, generator)
        # advantage
        if critic:
            with torch.no_grad():
                value = torch.sigmoid(critic(batch.inputs))
            advantage = lambda_advantage(value, batch.reward, batch.mask, c.rl_lambda)
        else:
            advantage = terminal_advantage(batch.reward)[:, None]
        # update: without a critic and without a single success every advantage, hence the gradient, is exactly zero
        if advantage.any():
            for _ in range(c.rl_epochs):
                for index in torch.randperm(len(batch.reward), generator=generator, device=run.device).chunk(
                    c.rl_minibatches
                ):
                    longest = int(batch.mask[index].sum(1).max())
                    inputs, chosen, old, mask = (part[index, :longest] for part in batch[:4])
                    credit = advantage[index, :longest]
                    loss = policy_loss(learner.log_prob(inputs, chosen), old, credit, mask, c.rl_clip)
                    update(learner.model, loss, [learner.optimiser], [])
                    if critic:
                        update(critic, value_loss(critic(inputs), batch.reward[index], mask), [critic_optimiser], [])
        # log
        run.log(episodes, c.rl_episodes, "episodes", success=curve[-1][1], decisions=decisions)
    return curve


def internal_rl(run: Run, base: BaseModel, meta: Metacontroller) -> tuple[Policy, dict]:
    """Phase 3 -> (policy, metrics: the learning curve, final success of the policy's samples and of its means)."""
    started = time.time()
    run.start("rl")
    policy = Policy(run.config).to(run.device)
    learner = InternalLearner(run, base, meta, policy)
    curve = reinforce(run, "rl", learner)
    minutes = (time.time() - started) / 60
    success, mean_success = (
        learner.collect(4 * run.config.eval_episodes, *run.start("evaluate"), sample).reward.mean().item()
        for sample in (True, False)
    )
    run.say(f"internal RL: post-training success {success:.3f}, with mean codes {mean_success:.3f}")
    return policy, {
        "internal_rl_success": success,
        "internal_rl_mean_success": mean_success,
        "curve": curve,
        "episodes": curve[-1][0] if curve else 0,
        "minutes_rl": minutes,
    }


def raw_rl(run: Run, base: BaseModel) -> tuple[BaseModel, dict]:
    """Raw-action RL of a copy of the base, with the same episodes -> (fine-tuned copy, metrics)."""
    started = time.time()
    run.start("raw")
    model = BaseModel(run.config).to(run.device)
    model.load_state_dict(base.state_dict())
    learner = RawLearner(run, model)
    curve = reinforce(run, "raw", learner)
    minutes = (time.time() - started) / 60
    success = learner.collect(4 * run.config.eval_episodes, *run.start("evaluate")).reward.mean().item()
    run.say(f"raw-action RL: post-training success {success:.4f}")
    return model, {"raw_rl_success": success, "raw_curve": curve, "minutes_raw": minutes}


# ----------------------------------------------------------------------------------------------------
# Figures (matplotlib is imported here only)
# ----------------------------------------------------------------------------------------------------


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise Failure("figures need matplotlib: pip install matplotlib, or pass --no-figures") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@torch.no_grad()
def draw_switches(run: Run, base: BaseModel, meta: Metacontroller, path: Path) -> None:
    """The soft gate over time on three held-out episodes; the shades are the true subgoals."""
    plt = pyplot()
    _, generator = run.start("figures")
    episodes = held_out(run).take(np.arange(3))
    subgoal, _ = subgoals(run.world, episodes)
    residual = lower_residual(run, base, run.tensor(episodes.inputs()[:, :-1]))
    mean, _ = posterior(run, base, meta, episodes, generator, brief=simulated(run))
    gate = meta.integrate(residual, mean)[1].cpu().numpy()
    figure, axes = plt.subplots(3, 1, figsize=(7, 4.5), sharex=True, layout="constrained")
    for i, axis in enumerate(axes):
        steps = int(episodes.mask[i].sum())
        for t in range(steps):
            axis.axvspan(t - 0.5, t + 0.5, color=f"C{subgoal[i, t]}", alpha=0.25, linewidth=0)
        axis.stem(np.arange(steps), gate[i, :steps], basefmt=" ", linefmt="k-", markerfmt="k.")
        axis.set(ylim=(0, 1.05), ylabel="gate")
    axes[0].set_title("Switch gate (bars) and true subgoal (shade); held-out expert episodes")
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(curve, raw_curve, path: Path) -> None:
    """Success of each training batch against episodes: internal RL and raw-action RL."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, points in (("internal RL", curve), ("raw-action RL", raw_curve)):
        if points:
            axis.plot(*zip(*points), label=name)
    axis.set(xlabel="episodes", ylabel="success, post-training task", ylim=(-0.02, 1.02))
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_episode(run: Run, base: BaseModel, meta: Metacontroller, policy: Policy, path: Path) -> None:
    """One episode of internal RL on the grid: the path has one colour per held code, circles are switches."""
    plt = pyplot()
    rng, generator = run.start("figures")
    pilot = CodePilot(meta, PolicyCodes(policy, generator, run.config.rl_decisions))
    result = rollout(run, base, pilot, 16, rng, generator, run.config.rl_temperature, record=True)
    i = int(result.reward.argmax())  # a solved one if there is one
    steps, world = int(result.mask[i].sum()), run.world
    places = base.embed.places(run.tensor(result.inputs[i, :steps])).cpu().numpy() - 0.5  # (steps, things, 2)
    column, row = places[:, -1].T
    content = np.full((world.size, world.size), -1)
    for thing, (x, y) in enumerate(places[0, :-1].round().astype(int)):
        content[y, x] = thing
    picture = envs.cell_picture(world, content.reshape(-1), 24)
    figure, axis = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    axis.imshow(picture, extent=(-0.5, world.size - 0.5, world.size - 0.5, -0.5))
    held = np.cumsum(result.switched[i, :steps]) - 1
    jitter = (held - held.max() / 2) * (0 if world.ant else 0.06)  # so that the legs do not hide each other
    for code in range(held.max() + 1):
        part = np.flatnonzero(held == code)
        part = np.append(part, part[-1] + 1)[: steps - part[0]]
        axis.plot(
            column[part] + jitter[part[0]], row[part] + jitter[part[0]], color=f"C{code}", label=f"code {code + 1}"
        )
        axis.plot(column[part[0]] + jitter[part[0]], row[part[0]] + jitter[part[0]], "o", color=f"C{code}")
    axis.set(
        title=f"{'solved' if result.reward[i] else 'not solved'}: task " + "-".join(map(str, world.post)),
        xticks=[],
        yticks=[],
    )
    for colour, (x, y) in enumerate(places[0, : world.colours]):
        axis.text(x - 0.4, y - 0.3, str(colour), fontweight="bold")
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------
# Stages and checkpoints: each stage depends on (config, seed, earlier stages) and is done once
# ----------------------------------------------------------------------------------------------------

STAGES = {"pretrain": ("pretrain", "steer"), "discover": ("discover",), "rl": ("rl", "raw")}  # of each --phase
ORDER = ("pretrain", "steer", "discover", "rl", "raw")
NEEDS = {
    "pretrain": (),
    "steer": ("pretrain",),
    "discover": ("pretrain",),
    "rl": ("pretrain", "discover"),
    "raw": ("pretrain",),
}


def fields_of(stage: str) -> set[str]:
    """Config fields on which a stage or those before it depend: changing another leaves its checkpoint valid."""
    names = [f.name for f in fields(Config)]
    later = {"pretrain": "rank", "steer": "history_dim", "discover": "rl_episodes", "rl": "raw_lr"}  # not from here on
    used = set(names[: names.index(later[stage])] if stage in later else names)
    if stage == "raw":  # it knows no metacontroller and no policy
        used -= set(names[names.index("rank") : names.index("rl_episodes")])
        used -= {"rl_decisions", "rl_lr", "rl_std_lr", "rl_lambda", "policy_dim", "policy_std"}
    return used if stage == "steer" else used - {"steer_steps", "steer_batch", "steer_lr"}


def save_checkpoint(run: Run, stage: str, model: nn.Module, metrics: dict) -> None:
    """Write OUT/stage.pt: plain Python and tensors, whole or not at all."""
    path = run.out / f"{stage}.pt"
    plain = json.loads(json.dumps(metrics, default=float))  # no numpy scalars: torch.load refuses them
    content = {"config": asdict(run.config), "seed": run.seed, "model": model.state_dict(), "metrics": plain}
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run: Run, stage: str) -> dict | None:
    """Read OUT/stage.pt, or None. Raises Failure if it belongs to another config or seed."""
    path = run.out / f"{stage}.pt"
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location=run.device)
        config, seed = content["config"], content["seed"]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Failure(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to redo this phase"
        ) from None
    if seed != run.seed:
        raise Failure(f"{path}: made with --seed {seed}, this run has --seed {run.seed}; choose another --out")
    for name in sorted(fields_of(stage)):
        ours = getattr(run.config, name)
        if config.get(name) != ours:
            raise Failure(f"{path}: made with --{name}={config.get(name)}, this run has {ours}; choose another --out")
    return content


def build(run: Run, stage: str) -> nn.Module:
    """An untrained model of the stage, to load a checkpoint into."""
    c = run.config
    zeros = torch.zeros(c.dim)
    model = {
        "pretrain": lambda: BaseModel(c), "raw": lambda: BaseModel(c), "rl": lambda: Policy(c),
        "steer": lambda: Labels(c, zeros, len(run.world.subgoals)), "discover": lambda: Metacontroller(c, zeros),
    }[stage]()  # fmt: skip
    return model.to(run.device)


def run_stage(run: Run, stage: str, models: dict) -> dict:
    """Load the stage if it is finished, else do it and save it. Adds its model to `models`, returns its metrics."""
    content = load_checkpoint(run, stage)
    if content:
        models[stage] = build(run, stage)
        models[stage].load_state_dict(content["model"])
        models[stage].requires_grad_(stage == "raw")
        run.say(f"{stage}: loaded {run.out / stage}.pt")
        return content["metrics"]
    functions = {"pretrain": pretrain, "steer": steer, "discover": discover, "rl": internal_rl, "raw": raw_rl}
    models[stage], metrics = functions[stage](run, *(models[name] for name in NEEDS[stage]))
    save_checkpoint(run, stage, models[stage], metrics)
    return metrics


SEED_KEYS = (
    "seed", "base_excess_nats", "steer_success", "switch_precision", "switch_recall", "random_switch_precision",
    "random_switch_recall", "unseen_transition_probability", "random_code_success", "counting_success",
    "code_accuracy", "internal_rl_success", "internal_rl_mean_success", "raw_rl_success", "episodes", "minutes",
)  # fmt: skip
# the ant's also by its expert's success
NORMALISED = "steer_success", "internal_rl_success", "internal_rl_mean_success", "raw_rl_success"
ANT_KEYS = "base_reach", "expert_success", "expert_post_success", *(f"{key}_normalised" for key in NORMALISED)


def wanted_stages(phase: str) -> list[str]:
    """The stages that `--phase` asks for."""
    return [stage for name in (STAGES if phase == "all" else [phase]) for stage in STAGES[name]]


def check_checkpoints(run: Run, phase: str) -> None:
    """Raise Failure if a checkpoint belongs to another run or one that `phase` needs is missing. Writes nothing."""
    wanted = wanted_stages(phase)
    for stage in ORDER:
        needed = stage not in wanted and any(stage in NEEDS[other] for other in wanted)
        if load_checkpoint(run, stage) is None and needed:
            path = run.out / f"{stage}.pt"
            raise Failure(f"--phase {phase}: {path} is missing; run --phase {stage} with the same --out first")


def run_alone(stage: str, threads: int, *arguments) -> None:
    """What a process of its own does: `stage`, whose needs are finished, of the Run with these arguments."""
    torch.set_num_threads(threads)
    run, models = Run(*arguments), {}
    try:
        for name in (*NEEDS[stage], stage):
            run_stage(run, name, models)
    except Failure as failure:
        sys.exit(f"internal_rl: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)


def start_beside(run: Run, stage: str, threads: int):
    """Start `stage` in a process of its own, which ends with ours, and leaves its checkpoint if all goes well."""
    arguments = stage, threads, run.config, run.seed, run.device, run.out, run.quiet
    process = torch.multiprocessing.get_context("spawn").Process(target=run_alone, args=arguments, daemon=True)
    process.start()
    return process


def run_seed(run: Run, phase: str, figures: bool) -> dict:
    """All stages of `phase` for one seed, resuming what is finished; returns the metrics so far.

    The ant's internal RL and raw-action RL run side by side, as its rollouts gain nothing from a second thread.
    """
    models, metrics, threads, beside = {}, {"seed": run.seed}, torch.get_num_threads(), None
    for stage in ORDER:
        wanted = stage in wanted_stages(phase) or (run.out / f"{stage}.pt").exists()
        both_left = not any((run.out / f"{name}.pt").exists() for name in ("rl", "raw"))
        if wanted and stage == "rl" and both_left and run.world.ant and threads > 1:
            beside = start_beside(run, "raw", threads // 2)
            torch.set_num_threads(threads - threads // 2)
        if stage == "raw" and beside:
            beside.join()
            torch.set_num_threads(threads)
            if beside.exitcode:
                raise Failure("raw-action RL failed in its process, see above; the same command tries it again", 1)
        if wanted:
            metrics |= run_stage(run, stage, models)
    if run.world.ant:
        expert = max(metrics["expert_post_success"], 1e-9)
        metrics |= {f"{key}_normalised": metrics[key] / expert for key in NORMALISED if key in metrics}
    metrics["minutes"] = sum(value for name, value in metrics.items() if name.startswith("minutes_"))
    write_json(run.out / "results.json", metrics)
    if figures and "discover" in models:
        draw_switches(run, models["pretrain"], models["discover"], run.out / "switches.png")
    if figures and "rl" in models:
        draw_curves(metrics["curve"], metrics.get("raw_curve"), run.out / "rl_curve.png")
        draw_episode(run, models["pretrain"], models["discover"], models["rl"], run.out / "episode.png")
    return metrics


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1, default=float) + "\n")


# ----------------------------------------------------------------------------------------------------
# Benchmark
# ----------------------------------------------------------------------------------------------------


def seconds_per_call(function, repeats: int) -> float:
    """Median seconds of a call, after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def benchmark(device: torch.device) -> dict:
    """Speeds of this machine: grid core, expert, discovery against pretraining at the paper's sizes, rollouts."""
    rng, world = np.random.default_rng(0), envs.TASK_SETS["paper"]
    B = 8192
    batch = envs.GridBatch(world, envs.sample_layouts(world, B, rng), [world.post] * B, roam=True)
    actions = rng.integers(4, size=B)
    out = {"grid_steps_per_second": B / seconds_per_call(lambda: batch.step(actions), 50)}
    out["expert_episodes_per_second"] = 4096 / seconds_per_call(
        lambda: envs.expert_episodes(world, world.pretrain, 4096, rng), 3
    )
    c = replace(PAPER, pretrain_batch=64, discover_batch=64)
    run = Run(c, 0, device, quiet=True)
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    episodes = envs.expert_episodes(world, world.pretrain, 256, rng)[0]
    episodes = episodes.take(np.argsort(episodes.mask.sum(1))[96:160])  # B = 64, T about 32
    base = BaseModel(c).to(device)
    keep = torch.ones(episodes.mask.shape, device=device)
    optimisers, schedulers = make_optimisers(c, base, c.pretrain_lr, 100)

    def pretrain_step():
        update(base, pretrain_loss(run, base, episodes, keep, keep)[0], optimisers, schedulers)

    out["pretrain_step_seconds"] = seconds_per_call(pretrain_step, 5)
    base.requires_grad_(False)
    meta = Metacontroller(c, torch.zeros(c.dim)).to(device)
    optimiser, scheduler = adamw(meta, c.discover_lr, 100)

    def discover_step():
        update(meta, discovery_loss(run, base, meta, episodes, generator, 0.1, "free")[0], [optimiser], [scheduler])

    out["discover_step_seconds"] = seconds_per_call(discover_step, 5)
    out["discover_over_pretrain"] = out["discover_step_seconds"] / out["pretrain_step_seconds"]
    run = Run(GRID["laptop"], 0, device, quiet=True)
    base, meta = BaseModel(run.config), Metacontroller(run.config, torch.zeros(run.config.dim))
    for roam in (False, True):  # episodes that end early must cost less
        started = time.perf_counter()
        pilot = CodePilot(meta, PriorCodes(generator))
        steps = rollout(run, base, pilot, 1024, rng, generator, roam=roam).steps
        name = "rollout_all_alive" if roam else "rollout_mostly_dead"
        out[f"{name}_steps"], out[f"{name}_seconds"] = steps, time.perf_counter() - started
    out["peak_memory_gb"] = peak_memory_gb()
    return out


def peak_memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ----------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit status 2."""

    def error(self, message):
        raise Failure(message)


def parse_value(name: str, example, text: str):
    """The value of a config flag, of the type of its default."""
    try:
        if isinstance(example, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(example, tuple):
            return tuple(type(example[0])(part) for part in text.split(","))
        return type(example)(text.replace("_", "") if isinstance(example, int) else text)
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(example, bool) else f"like {show(example)}"
        raise Failure(f"--{name}={text}: must be {kind}") from None


def show(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def config_comments() -> dict[str, str]:
    """The comment beside each field of Config is its help text."""
    lines = Path(__file__).read_text().split("class Config:")[1].split("\nCLASSROOM")[0].splitlines()
    found = {}
    for line in lines:
        if ": " in line and "#" in line and not line.strip().startswith("#"):
            found[line.split(":")[0].strip()] = line.split("#", 1)[1].strip()
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Internal RL (arXiv 2512.20605): pretrain, discover, reinforce inside the model.",
        allow_abbrev=False,
    )
    parser.add_argument("--env", choices=list(PRESETS), default="grid", help="which tasks")
    parser.add_argument("--preset", choices=list(GRID), default="classroom", help="sizes and schedules")
    parser.add_argument("--phase", choices=["pretrain", "discover", "rl", "all"], default="all", help="what to run")
    parser.add_argument("--fast", action="store_true", help="shrink the preset to a smoke run of under a minute")
    parser.add_argument("--seed", default="0", help="seed, or several: 0,1,2 (then results of all are collected)")
    parser.add_argument("--out", help="folder of results (default: runs/ENV-PRESET, and seed-K in it)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: PyTorch's default)")
    parser.add_argument("--no-figures", action="store_true", help="do not draw (matplotlib is not needed then)")
    parser.add_argument("--benchmark", action="store_true", help="print this machine's speeds and stop")
    group = parser.add_argument_group("config fields (defaults: preset classroom)")
    comments = config_comments()
    for f in fields(Config):
        text = f"{comments[f.name]} [{show(f.default)}]".replace("%", "%%")
        group.add_argument(f"--{f.name}", help=text, metavar=type(f.default).__name__.upper())
    return parser


def make_config(args) -> Config:
    if args.preset not in PRESETS[args.env]:
        raise Failure(f"--preset {args.preset}: --env {args.env} has {', '.join(PRESETS[args.env])}")
    config = PRESETS[args.env][args.preset]
    if args.fast:
        config = replace(config, **FAST)
    given = {
        f.name: parse_value(f.name, f.default, getattr(args, f.name))
        for f in fields(Config)
        if getattr(args, f.name) is not None
    }
    config = replace(config, **given)
    world = envs.TASK_SETS.get(config.world)
    if world and world.ant != (args.env == "ant"):
        raise Failure(f"--world={config.world}: not a world of --env {args.env}")
    check_config(config)
    return config


def make_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise Failure(f"--device {name}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise Failure("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def prepare_folder(path: Path, config: Config, seed: int) -> None:
    """Make the folder and write config.json, unless the folder belongs to another config or seed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        content = {"seed": seed, **asdict(config)}
        (path / "config.json.tmp").write_text(json.dumps(content, indent=1) + "\n")
        os.replace(path / "config.json.tmp", path / "config.json")
    except OSError as error:
        raise Failure(f"--out {path}: cannot write there ({error.strerror})") from None


def describe_machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "mujoco", "gymnasium")}
    return {"python": platform.python_version(), **packages}


def print_summary(metrics: dict) -> None:
    print("--- results")
    for name, value in metrics.items():
        if not isinstance(value, list):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"peak_memory_gb: {peak_memory_gb():.2f}")


def main(argv=None) -> int:
    try:
        return run_command(make_parser().parse_args(argv), argv)
    except Failure as failure:
        print(f"internal_rl: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        print("internal_rl: interrupted; the same command resumes after the last finished phase", file=sys.stderr)
        return 130


def run_command(args, argv) -> int:
    config, device = make_config(args), make_device(args.device)
    try:
        seeds = [int(text) for text in args.seed.split(",")]
    except ValueError:
        raise Failure(f"--seed {args.seed}: must be a number, or several such as 0,1,2") from None
    if not 0 <= min(seeds) <= max(seeds) < 10**6:
        raise Failure(f"--seed {args.seed}: must be between 0 and 999999")
    if args.threads < 0:
        raise Failure(f"--threads {args.threads}: must be 0 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.benchmark:
        for name, value in benchmark(device).items():
            print(f"{name}: {value:,.3g}" if value < 1000 else f"{name}: {value:,.0f}", flush=True)
        return 0
    if not args.no_figures:
        pyplot()  # say at once if it is missing
    folder = Path(args.out or f"runs/{args.env}-{args.preset}{'-fast' if args.fast else ''}")
    alone = len(seeds) == 1 and args.out
    print(f"internal_rl: --env {args.env} --preset {args.preset}; {versions()}; {describe_machine()}; "
          f"{torch.get_num_threads()} threads; {device}; to {folder}")  # fmt: skip
    entries = []
    runs = [Run(config, seed, device, folder if alone else folder / f"seed-{seed}") for seed in seeds]
    for run in runs:
        check_checkpoints(run, args.phase)  # a mismatch must stop us before anything is written
    for run in runs:
        prepare_folder(run.out, config, run.seed)
        metrics = run_seed(run, args.phase, not args.no_figures)
        print_summary(metrics)
        entries.append({key: metrics[key] for key in (*SEED_KEYS, *ANT_KEYS) if key in metrics})
    if not alone:
        command = "python internal_rl.py " + " ".join(sys.argv[1:] if argv is None else argv)
        summary = {"preset": args.preset, "command": command, "machine": describe_machine(), "versions": versions()}
        write_json(folder / f"{args.env}-{args.preset}.json", {**summary, "seeds": entries})
    return 0


if __name__ == "__main__":
    sys.exit(main())
