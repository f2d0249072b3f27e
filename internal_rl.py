"""Internal RL: reinforcement learning inside a frozen sequence model (arXiv 2512.20605), on a laptop CPU.

    python internal_rl.py --env grid                      # preset `classroom`: everything, from nothing
    python internal_rl.py --env grid --preset laptop      # the paper's 7x7 task, a model sized for a CPU
    python internal_rl.py --env ant                       # the paper's ant
    python internal_rl.py --env grid --fast               # a smoke run of the same code, under a minute

Three phases, in the order of this file:

    1. pretrain: the base model learns to predict the actions of experts whose goals are hidden. Then it is frozen.

       observation o_t -> [lower blocks] -> residual e_t -> [upper blocks] -> action a_t

    2. discover: the metacontroller learns to steer the frozen base. Its encoder sees the whole episode, future
       included, but with the cells exchanged at random ("shuffled"). Its gate sees the real past.

       episode, shuffled -> [encoder] -> proposal z~_t
                                             |
       residual e_t -> [gate] beta_t = 1: adopt the proposal, 0: keep the code -> code z_t -> [decoder] -> U_t
                                                                                                            |
       observation o_t -> [lower blocks] -> residual e_t ----------------- e_t + U_t e_t -> [upper blocks] -> a_t

    3. rl: a causal policy takes the encoder's place. Its actions are codes, one for each opening of the gate, and it
       learns a longer task from one reward at the very end. Everything else is frozen.

       residual e_t, where the gate opens -> [policy] -> code z, held until the gate opens again

A run prints how far the base is from the best possible predictor, how well ground-truth controllers steer it, a raster
of true subgoals over switch marks, the learning curve, and a block of `key: value` lines. It writes run.pt (its
models), metrics.csv, config.json, results.json and a picture to --out. Run it again to resume after an interruption.

Glossary (B or N episodes, T steps, F numbers in an observation, D width of the residual stream, R rank of controllers;
Z, H, S sizes of code, history and summary; K is said where it occurs)

    here              paper    shape        meaning                                                    where
    residual          e_t      (B, T, D)    residual stream of the base after block `control_block`    Eq. 1
    history           h_t      (B, T, H)    GRU over e_1..e_t; the encoder's: over the shuffled copy   App. D.2
    summary           s        (B, S)       embedding of the whole (shuffled) episode                  App. D.2
    mean, log_std     mu, Sig  (B, T, Z)    the encoder's Gaussian over the code proposal              Eq. 11-18
    proposal          z~_t     (B, T, Z)    sample of that Gaussian                                    App. D.2
    gate              beta_t   (B, T)       1 adopts the proposal, 0 keeps the code                    Eq. 2
    code              z_t      (B, T, Z)    z_t = beta_t z~_t + (1 - beta_t) z_t-1                     Eq. 2
    controller        U_t      (never made) U = out^T inn, each a sum of (R, D) weighted by decoder(z) Eq. 3
    kl_weight         alpha    scalar       price of a nat of code                                     Eq. 3

What differs from the paper and can be left out is marked "departure" in `Config`; README, "Departures", says what it
is worth, and "Open questions" what else differs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import envs

# ----------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------


# Kinds of int and float, with the least and the most that a flag may set them to.
Many = Count = Natural = int
Chance = Weight = Rate = float
BOUNDS = {
    "Many": (16, 10**12), "Count": (1, 10**12), "Natural": (0, 10**12),
    "Chance": (0, 1), "Weight": (0, 10**6), "Rate": (1e-9, 10**6),
}  # fmt: skip
CHOICES = {"world": envs.WORLDS, "memory": ("segment", "none", "full")}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Comments: meaning (source); the defaults are the preset `classroom`."""

    # task and evaluation
    world: str = "small"  # in envs.WORLDS (paper: App. A; small: ours)
    eval_episodes: Many = 1024  # held-out episodes; RL is measured on 4 times as many of its own
    # base model (paper: App. C.1, D.1)
    layers: Count = 3  # blocks (paper: 6; ant: 8)
    dim: Many = 96  # D, width of the residual stream (paper: n_e = 256)
    heads: Count = 4  # attention heads (paper)
    mlp: Count = 256  # hidden units of each MLP (paper: 512)
    swiglu: bool = True  # departure: gated MLPs instead of ReLU
    relative_obs: bool = True  # departure: objects at their offset from the agent, not at their cell
    init_scale: Rate = 0.33  # variance of initial weights x fan-in (paper: 0.1)
    control_block: Natural = 1  # the controller acts after this many blocks (paper: layers / 2)
    memory: str = "none"  # departure: of the steered base: none, segment (since the last switch) or full (paper)
    # phase 1: pretrain
    pretrain_steps: Natural = 3000  # (paper: 256,000)
    pretrain_batch: Count = 128  # episodes (paper: 1024)
    pretrain_lr: Rate = 6e-3  # peak; 3 times that for what Muon does not train (paper: 3e-4)
    fast_optimiser: bool = True  # departure: Muon for the blocks' matrices; rates that fall
    obs_loss: Weight = 0.0  # lambda, weight of next-observation prediction (paper: 0 or 0.01; ant: 10)
    jumps: Chance = 0.1  # departure: chance per step of a jump; up to half of the episodes start on a colour
    # check: one controller per ground-truth subgoal
    discover_batch: Count = 64  # episodes, here and in phase 2 (paper: 512)
    rank: Count = 16  # of the controllers (paper: 16 on the grid)
    steer_steps: Natural = 700  # (ours)
    steer_lr: Rate = 5e-3  # peak (ours)
    # phase 2: discover (paper: App. D.2, Table of sizes)
    history_dim: Count = 32  # n_h (paper)
    summary_dim: Count = 32  # n_s (paper)
    encoder_hidden: Count = 64  # (paper)
    code_dim: Count = 8  # n_z (paper)
    decoder_hidden: Count = 32  # (paper)
    shuffle: bool = True  # departure: the encoder sees a copy of the episode with its cells exchanged at random
    discover_steps: Natural = 3000  # (paper: 64,000)
    discover_lr: Rate = 6e-3  # peak (paper: 1e-3)
    free_steps: Natural = 250  # departure: so long the KL costs nothing, then for as long ever more
    kl_weight: Weight = 0.05  # alpha (paper: searched in 0 .. 1)
    # phase 3: internal RL, and RL on raw actions (paper: App. C.5)
    policy_dim: Count = 64  # width of the recurrent policy (paper: 256)
    temperature: Rate = 0.3  # departure: of the base's actions when codes steer it (paper: 1)
    threshold: Chance = 0.5  # the gate opens above this (paper)
    rl_episodes: Natural = 60_000  # (paper: up to 100,000 x 1024)
    rl_batch: Count = 1024  # episodes collected at a time (paper)
    rl_lr: Rate = 2e-3  # Adam (paper: 3e-5)
    rl_epochs: Count = 3  # passes over a batch
    rl_minibatches: Count = 4  # updates per pass
    rl_clip: Chance = 0.5  # bound of PPO's ratio, new probability of a decision to old, around 1 (PPO's usual: 0.2)
    raw_lr: Rate = 1e-4  # raw-action RL, which fine-tunes the base (paper: 3e-5)


CLASSROOM = Config()
PAPER = replace(
    CLASSROOM, world="paper", layers=6, dim=256, mlp=512, swiglu=False, relative_obs=False, init_scale=0.1,
    control_block=3, memory="full", pretrain_steps=256_000, pretrain_batch=1024, pretrain_lr=3e-4,
    fast_optimiser=False, obs_loss=0.01, jumps=0.0, shuffle=False, discover_steps=64_000, discover_batch=512,
    discover_lr=1e-3, free_steps=0, kl_weight=0.17, temperature=1.0, policy_dim=256,
    rl_episodes=102_400_000, rl_lr=3e-5, rl_epochs=1, rl_minibatches=1, rl_clip=0.2, raw_lr=3e-5,
)  # fmt: skip
PRESETS = {
    "grid": {
        "classroom": CLASSROOM,
        "laptop": replace(
            CLASSROOM, world="paper", layers=4, memory="segment", pretrain_steps=10_000, pretrain_batch=64,
            pretrain_lr=5e-3, jumps=0.05, steer_steps=1500, discover_steps=5000, discover_batch=32,
            discover_lr=3e-3, free_steps=900, kl_weight=0.1, rl_episodes=200_000,
        ),
        "paper": PAPER,
    },
    "ant": {
        "classroom": replace(
            CLASSROOM, world="ant", layers=4, dim=128, jumps=0.4, obs_loss=10.0, pretrain_steps=5000,
            pretrain_batch=64, pretrain_lr=5e-3, steer_steps=1600, steer_lr=6e-3, discover_steps=7000,
            discover_lr=2e-3, free_steps=3000, kl_weight=2.0, rl_episodes=30_720, rl_batch=512, rl_lr=1e-3,
            eval_episodes=512,
        ),
        "paper": replace(
            PAPER, world="ant-simulated", layers=8, control_block=4, obs_loss=10.0,
            pretrain_steps=204_800, pretrain_batch=512, discover_steps=32_000, discover_batch=128, discover_lr=3e-4,
            rl_episodes=13_107_200, rl_batch=256,
        ),
    },
}  # fmt: skip
FAST = {
    "layers": 2, "dim": 32, "mlp": 64, "control_block": 1, "pretrain_steps": 30, "pretrain_batch": 32,
    "steer_steps": 10, "discover_steps": 20, "discover_batch": 16, "free_steps": 5,
    "rl_episodes": 128, "rl_batch": 64, "eval_episodes": 16,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Base model (paper: App. C.1, D.1)
#
# A causal sequence model: it reads the observations of an episode one after the other and predicts the expert's next
# action. Between its blocks each step has a vector of D numbers, the residual stream, to which every block adds. The
# lower blocks end where the controller will act on that vector.
#
# Every block maps (x (B, T, D), keep (B, T), state) to (y, state). T > 1 is the parallel form, T = 1 with the state
# carried along is the step form. keep_t says what is carried from step t-1 into step t: 1 everything; 0 (next to)
# nothing, step t starts afresh as an episode does. Without keep (None) every step does. A state is a tuple of tensors,
# batch first; it is empty where an episode starts and where steps are alone.
# ----------------------------------------------------------------------------------------------------


class AttentionMixer(nn.Module):
    """Causal multi-head attention with a T5-style relative bias (32 buckets); forgetting is one more bias."""

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(c.heads, self.BUCKETS))
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def bucket(self, distance):
        """Distances 0..15 have a bucket each, longer ones share buckets on a log scale."""
        exact = self.BUCKETS // 2
        ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.FARTHEST / exact)
        coarse = exact + (ratio * (self.BUCKETS - exact)).long()
        return torch.where(distance < exact, distance, coarse.clamp(max=self.BUCKETS - 1))

    def forward(self, x, keep, state):
        B, T, D = x.shape
        if keep is None:  # a step that is alone attends to itself
            return self.out(F.linear(x, self.qkv.weight[2 * D :])), ()
        q, keys, values = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # What step s wrote reaches step t times keep_s+1 ... keep_t: the log of that is added to the score. A keep of
        # 0 counts as 1e-4, so that it still has a gradient.
        log_kept = torch.log(1e-4 + (1 - 1e-4) * keep).cumsum(dim=1)
        if state:
            keys, values = torch.cat([state[0], keys], dim=2), torch.cat([state[1], values], dim=2)
            log_kept = torch.cat([state[2], state[2][:, -1:] + log_kept], dim=1)
        S = keys.shape[2]
        distance = torch.arange(S - T, S, device=x.device)[:, None] - torch.arange(S, device=x.device)
        reached = log_kept[:, S - T :, None] - log_kept[:, None]
        bias = self.bias[:, self.bucket(distance.clamp_min(0))] + reached[:, None]
        bias = bias.masked_fill(distance < 0, -torch.inf)  # (B, heads, T, keys)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(B, T, D)), (keys, values, log_kept)


class MLP(nn.Module):
    """ReLU MLP as in the paper, or SwiGLU: the base must multiply "which goal" by "where it lies"."""

    def __init__(self, c: Config):
        super().__init__()
        self.up = nn.Linear(c.dim, c.mlp, bias=False)
        self.gate = nn.Linear(c.dim, c.mlp, bias=False) if c.swiglu else None
        self.down = nn.Linear(c.mlp, c.dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gate else F.relu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block: x + mix(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config):
        super().__init__()
        self.mix_norm, self.mlp_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)
        self.mixer = AttentionMixer(c)
        self.mlp = MLP(c)

    def forward(self, x, keep, state):
        y, state = self.mixer(self.mix_norm(x), keep, state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class GridEmbedding(nn.Module):
    """Linear map of the grid observation, given as the cells of its ones: (B, T, O + W + 1) -> (B, T, D).

    Absolute: a weight vector for each (object, cell), which is a plain linear layer on the 637 numbers. Relative:
    a vector for each (object, offset from the agent), which is learned many times faster and says the same, but for
    the names of the walls, which mean nothing. There the colours share their geometry: vector = features(offset) @
    matrix(colour) + obstacle(offset); walls are obstacles and no more.
    """

    FEATURES = 24

    def __init__(self, c: Config, world: envs.World, dim: int):
        super().__init__()
        self.relative, self.size, cells, O = c.relative_obs, world.size, world.size**2, world.colours
        if self.relative:
            offsets = (2 * world.size - 1) ** 2
            self.features = nn.Parameter(0.5 * torch.randn(offsets, self.FEATURES))
            self.colour = nn.Parameter(torch.randn(O, self.FEATURES, dim) * self.FEATURES**-0.5)
            self.obstacle = nn.Parameter(0.1 * torch.randn(offsets, dim))
            self.agent = nn.Parameter(0.1 * torch.randn(cells, dim))
            first_row = torch.tensor([*range(O), *[O] * world.walls, O + 1]) * offsets
        else:
            self.weight = nn.Parameter(torch.randn(world.objects * cells, dim) * (c.init_scale / world.objects) ** 0.5)
            first_row = torch.arange(world.objects) * cells
        self.register_buffer("first_row", first_row, persistent=False)

    def table(self):
        """One row per (object, place), (rows, D)."""
        if not self.relative:
            return self.weight
        colours = self.features @ self.colour + self.obstacle
        return torch.cat([colours.flatten(0, 1), self.obstacle, self.agent])

    def forward(self, cells):
        if self.relative:  # offset (row, column) = (0, 0) is in the middle of (2 G - 1)^2
            place = cells // self.size * (2 * self.size - 1) + cells % self.size
            offset = place[..., :-1] - place[..., -1:] + 2 * self.size * (self.size - 1)
            cells = torch.cat([offset, cells[..., -1:]], dim=-1)
        rows = (cells + self.first_row).flatten(0, -2)
        return F.embedding_bag(rows, self.table(), mode="sum").unflatten(0, cells.shape[:-1])


class AntEmbedding(nn.Module):
    """The ant's observation (B, T, F) -> (B, T, D).

    Absolute: a linear map of the observation. Relative: the cells of colours, walls and ant go through
    `GridEmbedding`; the body is seen in its own frame, together with the direction of each neighbouring cell's centre.
    The body gets a quarter of the width to itself: added to the cells, it would drown them. And the colour that the
    ant stands on gets an eighth: the metacontroller must find the visits among all that the residual says.
    """

    def __init__(self, c: Config, world: envs.AntWorld):
        super().__init__()
        self.size, self.parts, self.relative = world.size, world.parts, c.relative_obs
        width, under = (c.dim // 4, c.dim // 8) if self.relative else (c.dim, 0)
        self.cells = GridEmbedding(c, world, c.dim - width - under) if self.relative else None
        self.under = nn.Parameter(3 * torch.randn(world.colours, under)) if self.relative else None
        features = 1 + 2 + 8 + 12 + 12  # height, tilt, joints, rates, six vectors of the plane
        self.body = nn.Linear(features if self.relative else self.parts["local"].stop, width)

    def forward(self, obs):
        if not self.relative:
            return self.body(obs)
        height, orientation, joints, velocity, xy, things, local = (obs[..., part] for part in self.parts.values())
        places = torch.cat([things.unflatten(-1, (-1, 2)) + xy[..., None, :], xy[..., None, :]], dim=-2)
        places = (1 + places * places.new_tensor([1, -1])) * self.size / 2  # column and row
        column, row = places.floor().long().clamp(0, self.size - 1).unbind(-1)
        cells = row * self.size + column
        stands_on = (cells[..., : len(self.under)] == cells[..., -1:]).to(obs.dtype)
        # Vectors of the plane as complex numbers, turned into the frame of the torso (the velocity's symlog, too).
        w, x, y, z = (orientation.sign() * orientation.abs().expm1()).unbind(-1)
        yaw = torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        centres = torch.tensor([[0, 2], [0, -2], [-2, 0], [2, 0]], dtype=obs.dtype, device=obs.device)
        steps = F.normalize(centres - local[..., None, :], dim=-1)  # towards the centre above, below, left, right
        plane = torch.cat([velocity[..., None, :2], local[..., None, :], steps], dim=-2).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(plane) * torch.polar(torch.ones_like(yaw), -yaw)[..., None])
        tilt = torch.stack([w * x + y * z, w * y - x * z], dim=-1)
        body = torch.cat([height, tilt, joints, velocity[..., 2:], turned.flatten(-2)], dim=-1)
        return torch.cat([self.cells(cells), stands_on @ self.under, self.body(body)], dim=-1)


class GridHead(nn.Linear):
    """Action head of the grid, features (..., D) -> logits (..., 4), and a guess of the agent's next cell."""

    def __init__(self, c: Config, world: envs.World):
        super().__init__(c.dim, 4)
        self.next = nn.Linear(c.dim, world.size**2)

    def next_nll(self, features, obs):
        """-ln p(o_t+1) of what moves, features (B, T, D), obs (B, T, F) -> (B, T)."""
        return F.cross_entropy(self.next(features).transpose(1, 2), obs[..., -1], reduction="none")

    def log_prob(self, logits, action, temperature: float = 1.0):
        return F.log_softmax(logits / temperature, dim=-1).gather(-1, action[..., None])[..., 0]

    def sample(self, logits, temperature: float, generator):
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


class AntHead(nn.Linear):
    """Action head of the ant: mean (..., 8) of the torques, whose deviation is the same everywhere, and a guess of the
    next observation."""

    def __init__(self, c: Config, world: envs.World):
        super().__init__(c.dim, 8)
        self.log_std = nn.Parameter(torch.full((8,), -1.0))
        self.next = nn.Linear(c.dim, world.parts["local"].stop)

    def next_nll(self, features, obs):
        """Of a Gaussian of standard deviation 1, without its constant."""
        return 0.5 * (self.next(features) - obs).square().sum(-1)

    def log_prob(self, mean, action, temperature: float = 1.0):
        return gaussian_log_prob(action, mean, self.log_std + math.log(temperature))

    def sample(self, mean, temperature: float, generator):
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + temperature * self.log_std.exp() * noise


EMBEDDINGS = {"grid": lambda c, world: GridEmbedding(c, world, c.dim), "ant": AntEmbedding}  # by World.kind
HEADS = {"grid": GridHead, "ant": AntHead}


class BaseModel(nn.Module):
    """The causal sequence model that is pretrained, then frozen. `lower` ends where the controller acts.

    The blocks below the controller see each step alone, in all phases: with memory they would infer the goal from
    earlier moves, and the code would have nothing to say. With --memory full they have memory too, as in the paper.
    """

    def __init__(self, c: Config):
        super().__init__()
        world = envs.WORLDS[c.world]
        self.control_block, self.alone = c.control_block, c.memory != "full"
        self.embed = EMBEDDINGS[world.kind](c, world)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim)
        self.head = HEADS[world.kind](c, world)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(c.init_scale / module.in_features) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _run(self, blocks, x, keep, state):
        after = []
        for block, before in zip(blocks, state or [()] * len(blocks)):
            x, part = block(x, keep, before)
            after.append(part)
        return x, after

    def lower(self, obs, state=None):
        """Observations (B, T, F) -> residual (B, T, D), state."""
        x = self.embed(obs)
        keep = None if self.alone else torch.ones_like(x[..., 0])
        return self._run(self.blocks[: self.control_block], x, keep, state)

    def upper(self, residual, keep, state=None):
        """residual (B, T, D), keep (B, T) or None -> features (B, T, D), which `head` turns into an action, state."""
        x, state = self._run(self.blocks[self.control_block :], residual, keep, state)
        return self.norm(x), state

    def forward(self, obs):
        """Observations (B, T, F) -> features (B, T, D) of the model left alone, with all its memory."""
        residual, _ = self.lower(obs)
        return self.upper(residual, torch.ones_like(residual[..., 0]))[0]


# ----------------------------------------------------------------------------------------------------
# Metacontroller (paper: Sec. 3, App. D.2, Eqs. 1-3 and 11-18)
#
# It steers the frozen base. A code says in a few numbers what the base shall do; a decoder turns the code into a
# controller, a matrix U that is applied to the residual stream. A code is held until a gate opens and a new one is
# adopted. While the metacontroller learns, codes come from an encoder that sees the whole episode, future included. It
# proposes one at each *entry*: on the grid every step, for the ant the first, and each that leads into another cell.
# ----------------------------------------------------------------------------------------------------


class Controller(nn.Module):
    """Linear control of the residual stream: e^ = e + U e, where U = out^T inn has rank R.

    Both factors are weighted sums over K controllers: out = sum_k weight_k out_k, and inn alike. The residual is
    multiplied by inn first, then by out, so that no D x D matrix is ever built.
    """

    def __init__(self, c: Config, K: int):
        super().__init__()
        self.inn = nn.Parameter(torch.randn(K, c.rank, c.dim) * c.dim**-0.5)  # what it reads
        self.out = nn.Parameter(torch.zeros(K, c.rank, c.dim))  # what it writes: nothing at first

    def forward(self, residual, weight):
        """residual (..., D), weight (..., K) -> controlled residual (..., D)."""
        weight, (K, R, _) = weight[..., None], self.inn.shape
        inn_e = (residual @ self.inn.flatten(0, 1).T).unflatten(-1, (K, R))
        inn_e = (weight * inn_e).sum(-2, keepdim=True)  # (..., 1, R)
        return residual + (weight * inn_e).flatten(-2) @ self.out.flatten(0, 1)


def shift_right(x):
    """x_1..x_T -> 0, x_1..x_T-1 along time (dim 1)."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def memory_after(gate, before, memory: str):
    """keep (B, T) of the steered base, None if it has no memory; before (B, T): the gate one step earlier.

    segment: each switch is a fresh start, and the step of the switch itself leaves nothing behind either. There a
    controller sees the colour that the agent has come to. It would learn which subgoal follows which in the expert's
    tasks, and what the base remembers of a first step decides all others.
    """
    return {"segment": (1 - gate) * (1 - before), "none": None, "full": torch.ones_like(gate)}[memory]


class Metacontroller(nn.Module):
    """Discovers codes and when to switch them.

    The encoder is non-causal and reads a copy of the episode (`view`: shuffled, entries alone); the gate is causal and
    reads the episode itself, every step of it. Each has a history of what it reads, made by one and the same GRU.
    """

    def __init__(self, c: Config):
        super().__init__()
        D, H, S, Z = c.dim, c.history_dim, c.summary_dim, c.code_dim
        self.history = nn.GRU(D, H, batch_first=True)
        self.embedder = nn.GRU(D, S, batch_first=True)
        self.encoder = nn.Sequential(
            nn.Linear(D + H + S, c.encoder_hidden), nn.ReLU(), nn.Linear(c.encoder_hidden, 2 * Z)
        )
        self.switch = nn.Sequential(nn.Linear(D + H + Z, c.encoder_hidden), nn.ReLU(), nn.Linear(c.encoder_hidden, 1))
        self.decoder = nn.Sequential(nn.Linear(Z, c.decoder_hidden), nn.SiLU())
        self.controller = Controller(c, c.decoder_hidden + 1)
        nn.init.zeros_(self.switch[2].bias)
        self.encoder[2].bias.data[Z:] -= 2  # first deviation e^-2: a proposal is more than noise from the start

    def read(self, residual):
        """The residual stream as the metacontroller sees it: scaled to root mean square 1."""
        return F.rms_norm(residual, residual.shape[-1:])

    def encode(self, view, count):
        """Gaussian of the code proposals: view (B, K + 1, D) -> mean, log_std, each (B, K + 1, Z).

        Row `count` (B,) of the view is an episode's last observation, later ones are padding.
        """
        view = self.read(view)
        # The summary reads from the end to the start: position k of the reversed episode is count - k.
        reverse = (count[:, None] - torch.arange(view.shape[1], device=view.device)).clamp_min(0)[..., None]
        backward = self.embedder(view.gather(1, reverse.expand_as(view)))[0]
        summary = backward[torch.arange(len(view), device=view.device), count][:, None].expand(-1, view.shape[1], -1)
        history = shift_right(self.history(view)[0])
        return self.encoder(torch.cat([view, history, summary], dim=-1)).chunk(2, dim=-1)

    def gate(self, residual, history, code):
        """beta_t = f_switch(e_t, h_t-1, z_t-1) in [0, 1], causal: (..., D), (..., H), (..., Z) -> (...)."""
        return torch.sigmoid(self.switch(torch.cat([self.read(residual), history, code], dim=-1))).squeeze(-1)

    def integrate(self, residual, proposal, entry, threshold=None):
        """Temporal integration, Eq. 2. residual (B, T, D), proposal (B, T, Z) -> code (B, T, Z), gate (B, T).

        entry (B, T): the steps with a new proposal; the gate is 0 at others, as there is nothing to adopt. threshold:
        a code is adopted or kept as a whole, adopted where the gate is above it, as in phase 3.
        """
        history = shift_right(self.history(self.read(residual))[0])
        gate = torch.ones_like(proposal[:, 0, 0])  # the first step always adopts
        code = proposal[:, 0]
        codes, gates = [code], [gate]
        for t in range(1, proposal.shape[1]):
            gate = self.gate(residual[:, t], history[:, t], code) * entry[:, t]
            adopt = gate if threshold is None else (gate > threshold).float()
            # beta_t = 1 adopts the new code
            code = adopt[:, None] * proposal[:, t] + (1 - adopt[:, None]) * code
            codes.append(code)
            gates.append(gate)
        return torch.stack(codes, dim=1), torch.stack(gates, dim=1)

    def control(self, residual, code):
        """The code chooses the controller, its constant part included: (..., D), (..., Z) -> (..., D)."""
        return self.controller(residual, F.pad(self.decoder(code), (0, 1), value=1.0))


def code_kl(mean, log_std):
    """KL( N(mean, std^2) || N(0, I) ) in nats: (..., Z) -> (...)."""
    return 0.5 * (mean**2 + torch.exp(2 * log_std) - 2 * log_std - 1).sum(-1)


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, exp(log_std)^2), summed over the last dimension."""
    return (-0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


# ----------------------------------------------------------------------------------------------------
# What every phase needs: data, loss, optimisers
#
# A phase is a function of a `run`, which holds config, seed, device and world (section "Running"), and of the models
# of earlier phases. `run.start(phase)` seeds everything, so that a phase depends on nothing else.
# ----------------------------------------------------------------------------------------------------


def expert_batches(run: Run, rng: np.random.Generator, batch: int):
    """Endless batches of fresh expert trajectories; each holds episodes of similar length (less padding)."""
    while True:
        episodes = run.world.episodes(batch * max(1, 4096 // batch), rng)
        order = np.argsort(episodes.lengths, kind="stable").reshape(-1, batch)
        for i in rng.permutation(len(order)):
            yield episodes.take(order[i])


def action_nll(run: Run, base: BaseModel, features, episodes: envs.Episodes):
    """-ln p(the expert's action), nats; features (B, T, D) -> (B, T), 0 in padding."""
    return -base.head.log_prob(base.head(features), run.tensor(episodes.target)) * run.tensor(episodes.mask)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal: a matrix learns as fast in all of its directions.

    torch.optim.Muon does the same in bfloat16, which most laptop processors only emulate: ten times slower there.
    """

    def __init__(self, parameters, lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                wide = x if x.shape[0] <= x.shape[1] else x.T
                wide = wide / wide.norm().clamp_min(1e-7)
                for _ in range(5):  # Newton-Schulz iteration towards the nearest orthogonal matrix
                    gram = wide @ wide.T
                    wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # An orthogonal matrix has small entries; this makes its steps as large as AdamW's.
                size = 0.2 * max(p.shape) ** 0.5
                p.sub_(wide if wide.shape == p.shape else wide.T, alpha=group["lr"] * size)


def scheduled(c: Config, optimiser, steps: int) -> list:
    """The optimiser, and what warms its rate up and lowers it along a cosine; the paper's rates are constant."""
    if not c.fast_optimiser:
        return [optimiser]
    peak, total = optimiser.param_groups[0]["lr"], max(2, steps + (steps == 50))  # at 50 OneCycleLR divides by 0
    cycle = {"pct_start": 0.02, "div_factor": 25, "final_div_factor": 2, "cycle_momentum": False}
    return [optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total, **cycle)]


WEIGHT_DECAY = 0.03  # (paper)


def pretrain_optimisers(c: Config, base: BaseModel) -> list:
    """AdamW (paper), or Muon for the blocks' matrices and AdamW for the rest."""
    if not c.fast_optimiser:
        return [torch.optim.AdamW(base.parameters(), lr=c.pretrain_lr, weight_decay=WEIGHT_DECAY)]
    matrices = [module.weight for module in base.blocks.modules() if isinstance(module, nn.Linear)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in base.parameters() if id(p) not in chosen]
    muon = Muon(matrices, lr=c.pretrain_lr, weight_decay=WEIGHT_DECAY)
    adamw = torch.optim.AdamW(rest, lr=3 * c.pretrain_lr, weight_decay=WEIGHT_DECAY)  # embeddings like it faster
    return [*scheduled(c, muon, c.pretrain_steps), *scheduled(c, adamw, c.pretrain_steps)]


def update(model: nn.Module, loss, *steppers) -> None:
    """One gradient step of `model`, its gradient's norm clipped to 1, by optimisers and schedulers.

    Callers whose loss is a sum over steps divide it by about their number, to bring the gradient near that norm.
    """
    loss.backward()
    if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        raise Failure("the gradient is not a finite number; lower the learning rate of this phase", 1)
    for stepper in steppers:
        stepper.step()
    model.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------
# Phase 1: pretrain the base model (paper: App. C.1)
#
# In: trajectories of experts that pursue goals nobody tells us. Out: a model that predicts what they do next. To do so
# it has to work out from the moves so far which goal is pursued, and how one gets there. Phase 2 uses the second:
# there the code says which goal, and the base does not remember earlier moves, as they would say the same (`memory`).
# ----------------------------------------------------------------------------------------------------


def pretrain_loss(run: Run, base: BaseModel, episodes: envs.Episodes):
    """sum_t -ln p(a_t | o_1:t) - lambda ln p(o_t+1 | o_1:t), mean over episodes, nats -> (loss, stats)."""
    obs, mask = run.tensor(episodes.obs), run.tensor(episodes.mask)
    features = base(obs[:, :-1])
    nll = action_nll(run, base, features, episodes).sum(1).mean()
    if not run.config.obs_loss:
        return nll, {"nll": nll.item()}
    surprise = (base.head.next_nll(features, obs[:, 1:]) * mask).sum(1).mean()
    return nll + run.config.obs_loss * surprise, {"nll": nll.item(), "obs_nll": surprise.item()}


def pretrain(run: Run) -> BaseModel:
    """Train the base model on the expert's actions, then freeze it."""
    c = run.config
    rng, _ = run.start("pretrain")
    base = BaseModel(c).to(run.device)
    steppers = pretrain_optimisers(c, base)
    for step, episodes in zip(range(1, c.pretrain_steps + 1), expert_batches(run, rng, c.pretrain_batch)):
        loss, stats = pretrain_loss(run, base, episodes)
        length = episodes.mask.sum() / len(episodes.mask)
        update(base, loss / length, *steppers)
        run.log(step, c.pretrain_steps, "steps", nats_per_step=stats["nll"] / length, **stats)
    return base.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# Check: can the frozen base be steered at all? (paper: Fig. 4)
#
# This is not part of the method, and it uses the true subgoals: one controller is trained for each of them. If these
# cannot steer the base through a task that it has never seen, no discovered controller will.
# ----------------------------------------------------------------------------------------------------


class Labels(Controller):
    """One controller per ground-truth subgoal."""

    def __init__(self, c: Config):
        super().__init__(c, len(envs.WORLDS[c.world].subgoals))

    def control(self, residual, subgoal):
        """residual (..., D), subgoal (...) -> controlled residual (..., D)."""
        # Indexing does the same, but sums up its gradient in another order each time, so that runs would differ.
        return self(residual, F.one_hot(subgoal, len(self.out)).to(residual.dtype))


def subgoals(world: envs.World, episodes: envs.Episodes) -> tuple[np.ndarray, np.ndarray]:
    """True subgoal (N, T), -1 in the padding, and where it changes (N, T) bool, never at the first step."""
    subgoal = world.subgoal_of(episodes.goal)
    changed = np.zeros(subgoal.shape, dtype=bool)
    changed[:, 1:] = (subgoal[:, 1:] != subgoal[:, :-1]) & episodes.mask[:, 1:]
    return subgoal, changed


def steer(run: Run, base: BaseModel) -> Labels:
    """Train ground-truth controllers on the pretraining tasks."""
    c = run.config
    rng, _ = run.start("steer")
    labels = Labels(c).to(run.device)
    steppers = scheduled(c, torch.optim.Adam(labels.parameters(), lr=c.steer_lr), c.steer_steps)
    for step, episodes in zip(range(1, c.steer_steps + 1), expert_batches(run, rng, c.discover_batch)):
        subgoal, changed = subgoals(run.world, episodes)
        changed[:, 0] = True  # the first step is a switch, too
        switched = run.tensor(changed).float()
        residual, _ = base.lower(run.tensor(episodes.obs[:, :-1]))
        controlled = labels.control(residual, run.tensor(np.maximum(subgoal, 0)))
        features, _ = base.upper(controlled, memory_after(switched, shift_right(switched), c.memory))
        loss = action_nll(run, base, features, episodes).sum(1).mean()
        update(labels, loss / episodes.mask.shape[1], *steppers)
        run.log(step, c.steer_steps, "steps", nll=loss.item())
    return labels.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# Rollouts: the base model acts in the environment, and a pilot may steer its residual stream
# ----------------------------------------------------------------------------------------------------


class Pilot:
    """What steers the base in a rollout. This one leaves it alone, with all its memory."""

    memory = "full"

    def steer(self, residual, batch):
        """residual (B, D) -> controlled residual (B, D), opened gates (B,)."""
        return residual, torch.zeros_like(residual[:, 0])

    def select(self, kept) -> None:
        """Only the episodes `kept`, a mask (B,), live on."""


class LabelPilot(Pilot):
    """Ground-truth controllers, switched by hand when the true subgoal changes."""

    def __init__(self, run: Run, B: int, labels: Labels):
        self.run, self.memory, self.labels = run, run.config.memory, labels
        self.subgoal = torch.full((B,), -1, device=run.device)

    def steer(self, residual, batch):
        subgoal = self.run.tensor(batch.subgoal())
        opened, self.subgoal = (subgoal != self.subgoal).float(), subgoal
        return self.labels.control(residual, subgoal), opened

    def select(self, kept) -> None:
        self.subgoal = self.subgoal[kept]


class CodePilot(Pilot):
    """The metacontroller without its encoder: `choose` gives a new code where the gate opens, else the code is held.

    The gate is open at entries where beta_t is above the threshold, and at the first step. (Alg. 1)
    """

    def __init__(self, run: Run, B: int, meta: Metacontroller, choose):
        c, device = run.config, run.device
        self.run, self.memory, self.meta, self.choose = run, c.memory, meta, choose
        self.rows = torch.arange(B, device=device)  # of the living episodes
        self.history = torch.zeros(1, B, c.history_dim, device=device)
        self.code = torch.zeros(B, c.code_dim, device=device)
        self.first = True

    def steer(self, residual, batch):
        self.gate = self.meta.gate(residual, self.history[0], self.code) * self.run.tensor(batch.entered)
        opened = (self.gate > self.run.config.threshold) | self.first
        self.first = False
        if opened.any():
            self.code[opened] = self.choose(residual[opened], self.rows[opened])
        _, self.history = self.meta.history(self.meta.read(residual)[:, None], self.history)
        return self.meta.control(residual, self.code), opened.float()

    def select(self, kept) -> None:
        self.rows, self.history, self.code = self.rows[kept], self.history[:, kept], self.code[kept]


class Result(NamedTuple):
    """N finished episodes."""

    reward: torch.Tensor  # (N,)
    visited: np.ndarray  # (N, T) colour visited by each step, else -1
    switched: np.ndarray  # (N, T) open gates
    mask: np.ndarray  # (N, T) steps that were lived
    obs: torch.Tensor | None  # (N, T, F) if recorded
    action: torch.Tensor | None  # (N, T, ...) if recorded
    log_prob: torch.Tensor | None  # (N, T) of the actions if recorded


@torch.no_grad()
def rollout(run: Run, base: BaseModel, pilot, batch: envs.Batch, generator, temperature=1.0, record=False) -> Result:
    """The episodes of a batch, from where they stand to their ends.

    temperature scales the base's action distribution; record keeps observations and actions. Episodes step together
    and are dropped when they end: cost follows the living.
    """
    count, T, device = len(batch), run.world.limit, run.device
    visited, switched = np.full((count, T), -1, dtype=np.int8), np.zeros((count, T), dtype=bool)
    mask, reward = np.zeros((count, T), dtype=bool), torch.zeros(count, device=device)
    tables = None  # of observations, actions and their log-probabilities
    alive, lower, upper = np.arange(count), None, None
    for t in range(T):
        obs, rows = run.tensor(batch.observe()), run.tensor(alive)
        residual, lower = base.lower(obs[:, None], lower)
        controlled, opened = pilot.steer(residual[:, 0], batch)
        before = run.tensor(switched[alive, t - 1]).float()  # at the first step that is the last column, yet empty
        keep = memory_after(opened[:, None], before[:, None], pilot.memory)
        features, upper = base.upper(controlled[:, None], keep, upper)
        output = base.head(features[:, 0])
        if not output.isfinite().all():
            raise Failure(f"{run.phase}: the model's actions are no numbers; lower the learning rate", 1)
        action = base.head.sample(output, temperature, generator)
        visit, gain, done = batch.step(action.cpu().numpy())
        visited[alive, t], switched[alive, t], mask[alive, t] = visit, opened.bool().cpu().numpy(), True
        if record:
            values = obs, action, base.head.log_prob(output, action, temperature)
            tables = tables or [value.new_zeros(count, T, *value.shape[1:]) for value in values]
            for table, value in zip(tables, values):
                table[rows, t] = value
        reward[rows] += run.tensor(gain)
        if done.any():  # drop the dead
            kept = run.tensor(~done)
            alive = alive[~done]
            pilot.select(kept)  # before the batch: a viewer looks at it once more
            batch.select(~done)
            lower, upper = ([tuple(part[kept] for part in block) for block in state] for state in (lower, upper))
        if not len(alive):
            break
    return Result(reward, visited, switched, mask, *(tables or [None] * 3))


# ----------------------------------------------------------------------------------------------------
# Phase 2: discover controllers and when to switch them (paper: Sec. 3, App. D.2, Eq. 3)
#
# In: the frozen base and the same unlabelled trajectories. Out: a metacontroller. Its encoder may look at the whole
# episode, but each nat that it tells through the code costs alpha; so it tells what the base does not know, and only
# when there is something new to tell. That is when the gate learns to open.
# ----------------------------------------------------------------------------------------------------


def propose(run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, rng, generator):
    """What the encoder makes of a shuffled copy of the episodes: proposals (B, T, Z), drawn from its Gaussians, the
    steps at which there is a new one (B, T), and the nats that it costs there (B, T).

    The copy shows what is visited when, but neither headings nor places nor distances: a code read off it can name a
    colour and nothing else that transfers. This is what makes codes mean subgoals.

    The encoder reads an episode entry by entry, so that the pace does not matter. There alone can the gate open.
    """
    view = run.world.shuffled(episodes.obs, rng) if run.config.shuffle else episodes.obs
    entry = run.world.entries(episodes.obs)[:, :-1] & episodes.mask
    number, count = entry.cumsum(axis=1) - 1, entry.sum(axis=1)  # the entry that each step belongs to; entries in all
    steps = np.repeat(episodes.lengths[:, None], count.max() + 1, axis=1)  # the last observation closes each episode
    rows, at = np.nonzero(entry)
    steps[rows, number[entry]] = at
    residual, _ = base.lower(run.tensor(np.take_along_axis(view, steps[..., None], axis=1)))
    number, entry = run.tensor(number)[..., None].expand(-1, -1, run.config.code_dim), run.tensor(entry)
    mean, log_std = (part.gather(1, number) for part in meta.encode(residual, run.tensor(count)))
    noise = torch.randn(mean.shape, generator=generator, device=run.device)
    return mean + torch.exp(log_std) * noise, entry, code_kl(mean, log_std) * entry


def discovery_loss(run: Run, base, meta, episodes: envs.Episodes, rng, generator, charge: float):
    """sum_t -ln p(a_t | o_1:t, z_1:t) + alpha KL_t, mean over episodes, nats -> (loss, stats). Eq. 3.

    The KL is that of every proposal, adopted or not: it pays to propose something only where the gate will open.
    charge, 0 to 1, is the share of it that is charged. While it is below 1, the steered blocks have no memory, so that
    the code must say everything; from then on they remember what they will remember in phase 3. Gradients flow through
    the frozen upper blocks.
    """
    mask = run.tensor(episodes.mask)
    residual, _ = base.lower(run.tensor(episodes.obs[:, :-1]))
    proposal, entry, kl = propose(run, base, meta, episodes, rng, generator)
    code, gate = meta.integrate(residual, proposal, entry)
    keep = memory_after(gate, shift_right(gate), "none" if charge < 1 else run.config.memory)
    features, _ = base.upper(meta.control(residual, code), keep)
    nll = action_nll(run, base, features, episodes).sum(1).mean()
    kl = kl.sum(1).mean()
    gates = (gate * mask).sum(1).mean()
    return nll + charge * (run.config.kl_weight * kl), {"nll": nll.item(), "kl": kl.item(), "gates": gates.item()}


def discover(run: Run, base: BaseModel) -> Metacontroller:
    """Train the metacontroller on the frozen base, then freeze it too."""
    c = run.config
    rng, generator = run.start("discover")
    meta = Metacontroller(c).to(run.device)
    steppers = scheduled(c, torch.optim.Adam(meta.parameters(), lr=c.discover_lr), c.discover_steps)
    for step, episodes in zip(range(1, c.discover_steps + 1), expert_batches(run, rng, c.discover_batch)):
        charge = min(1.0, max(0, step - c.free_steps) / max(1, c.free_steps))
        loss, stats = discovery_loss(run, base, meta, episodes, rng, generator, charge)
        update(meta, loss / 10, *steppers)  # about the steps of an episode
        run.log(step, c.discover_steps, "steps", **stats)
    return meta.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# Phase 3: internal RL, and RL on raw actions through the same loop (paper: App. C.5, Algorithms 1-3)
#
# In: the frozen base and metacontroller. Out: a policy that chooses codes. An episode of a hundred steps is only a few
# decisions for it, one for each opening of the gate: this is contracted time. Codes already do sensible things, so
# random ones solve the task now and then (one episode in some thousands): there is something to learn from.
# ----------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Causal policy over codes: a GRU whose state advances at switches, then a Gaussian.

    At first it is the codes' prior, N(0, I). Its deviations stay above 0.1: the few successes of the first batches
    would make it narrow before its means are right, and the narrower it is, the less it learns about other codes.
    """

    LEAST_LOG_STD = -2.3

    def __init__(self, c: Config):
        super().__init__()
        self.memory = nn.GRU(c.dim, c.policy_dim, batch_first=True)
        self.head = nn.Linear(c.policy_dim, 2 * c.code_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, residual, state=None):
        """residual (B, K, D) at K successive switches -> mean, log_std (B, K, Z), state (1, B, policy_dim)."""
        x, state = self.memory(F.rms_norm(residual, residual.shape[-1:]), state)
        mean, log_std = self.head(x).chunk(2, dim=-1)
        return mean, log_std.clamp_min(self.LEAST_LOG_STD), state


class Decisions(NamedTuple):
    """What RL learns from: N episodes of K decisions. For internal RL a decision is a code, for raw RL an action."""

    inputs: torch.Tensor  # (N, K, D) residual at the switch | (N, K, F) observation
    chosen: torch.Tensor  # (N, K, Z) code | (N, K, ...) action
    log_prob: torch.Tensor  # (N, K) when it was chosen
    mask: torch.Tensor  # (N, K) decisions that were made
    reward: torch.Tensor  # (N,) terminal


class PolicyCodes:
    """Codes sampled from the policy, remembered with their log-probabilities: one row per switch, no more.

    Decision k of an episode is its k-th switch. Only the first 12 are remembered: an agent that walks in circles may
    switch at every step. Without `sample` codes are the means of the policy, to evaluate it.
    """

    MOST = 12

    def __init__(self, run: Run, B: int, policy: Policy, generator, sample: bool = True):
        c, device = run.config, run.device
        self.policy, self.generator, self.sample = policy, generator, sample
        self.state = torch.zeros(1, B, c.policy_dim, device=device)
        self.count = torch.zeros(B, dtype=torch.int64, device=device)  # decisions so far
        shapes = (c.dim,), (c.code_dim,), (), ()
        self.tables = [torch.zeros(B, self.MOST, *shape, device=device) for shape in shapes]

    def __call__(self, residual, rows):
        """residual (B, D) of the episodes `rows` (B,) whose gate is open -> code (B, Z)."""
        mean, log_std, self.state[:, rows] = self.policy(residual[:, None], self.state[:, rows])
        mean, log_std = mean[:, 0], log_std[:, 0]
        noise = torch.randn(mean.shape, generator=self.generator, device=mean.device)
        code = mean + torch.exp(log_std) * noise if self.sample else mean  # Alg. 2: z ~ pi(z | e_t, own state)
        k = self.count[rows]
        kept = k < self.MOST
        decision = residual, code, gaussian_log_prob(code, mean, log_std), torch.ones_like(mean[:, 0])
        for table, value in zip(self.tables, decision):
            table[rows[kept], k[kept]] = value[kept]
        self.count[rows] += 1
        return code


class InternalLearner:
    """RL inside the model: base, metacontroller and gate are frozen, the policy over codes learns."""

    def __init__(self, run: Run, base: BaseModel, meta: Metacontroller, policy: Policy):
        self.run, self.base, self.meta, self.model = run, base, meta, policy
        self.optimiser = torch.optim.Adam(policy.parameters(), lr=run.config.rl_lr)

    def collect(self, count: int, rng, generator, sample: bool = True) -> tuple[Decisions, float]:
        """Play `count` episodes -> what to learn from, success."""
        codes = PolicyCodes(self.run, count, self.model, generator, sample)
        pilot, batch = CodePilot(self.run, count, self.meta, codes), self.run.world.batch(count, rng)
        result = rollout(self.run, self.base, pilot, batch, generator, self.run.config.temperature)
        return Decisions(*codes.tables, result.reward), result.reward.mean().item()

    def log_prob(self, inputs, chosen):
        """Of each decision, (N, K)."""
        mean, log_std, _ = self.model(inputs)
        return gaussian_log_prob(chosen, mean, log_std)


class RawLearner:
    """The baseline: the same objective fine-tunes the base itself; a decision is a raw action.

    It learns from all successes of a batch and from 16 of its failures, drawn at random, as episodes are long. On
    average over the draws the advantages are those of the whole batch times a constant: in either, the advantages of
    the failures add up to minus those of the successes.
    """

    FAILURES = 16

    def __init__(self, run: Run, base: BaseModel):
        self.run, self.model = run, base
        self.optimiser = torch.optim.Adam(base.parameters(), lr=run.config.raw_lr)

    def collect(self, count: int, rng, generator) -> tuple[Decisions, float]:
        result = rollout(self.run, self.model, Pilot(), self.run.world.batch(count, rng), generator, record=True)
        mask = self.run.tensor(result.mask).float()
        batch = Decisions(result.obs, result.action, result.log_prob, mask, result.reward)
        kept = batch.reward > 0
        failed = torch.nonzero(~kept)[:, 0]
        kept[failed[torch.randperm(len(failed), generator=generator, device=failed.device)[: self.FAILURES]]] = True
        return Decisions(*(part[kept] for part in batch)), result.reward.mean().item()

    def log_prob(self, inputs, chosen):
        """Of each action, (N, K)."""
        return self.model.head.log_prob(self.model.head(self.model(inputs)), chosen)


def terminal_advantage(reward):
    """A = (R - mean R) / (std R + 1e-3) over the batch, the same for all decisions of an episode: (N,) -> (N,)."""
    return (reward - reward.mean()) / (reward.std(correction=0) + 1e-3)


def policy_loss(log_prob, old_log_prob, advantage, mask, clip: float):
    """PPO's clipped ratio, mean over decisions. log_prob, old_log_prob, mask (N, K), advantage (N,) -> scalar."""
    ratio = torch.exp((log_prob - old_log_prob) * mask)  # 1 in the padding
    advantage = advantage[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * mask).sum() / mask.sum()


def reinforce(run: Run, phase: str, learner) -> None:
    """Clipped REINFORCE on one terminal reward; run.curves[phase] becomes [(episodes, success of that batch)].

    What is left of PPO, and why: 1. no critic and no GAE: there is one reward, at the end, and its batch mean is
    the baseline. 2. no entropy bonus. 3. the clipped ratio stays, as it allows several passes over a batch; its bound
    is wide, since the few successes of the first batches shall move the policy far.
    """
    c = run.config
    rng, generator = run.start(phase)
    curve, episodes, peak = run.curves.setdefault(phase, []), 0, learner.optimiser.param_groups[0]["lr"]
    while episodes < c.rl_episodes:
        if c.fast_optimiser:  # in the second half the rate falls: what is left then is mostly the batches' noise
            learner.optimiser.param_groups[0]["lr"] = peak * min(1, 2 - 2 * episodes / c.rl_episodes)
        # collect
        batch, success = learner.collect(c.rl_batch, rng, generator)
        episodes += c.rl_batch
        curve.append((episodes, success))
        # advantage
        advantage = terminal_advantage(batch.reward)
        # update: without a single success every advantage is exactly zero, and there is nothing to learn from
        for _ in range(c.rl_epochs if advantage.any() else 0):
            order = torch.randperm(len(advantage), generator=generator, device=run.device)
            for index in order.chunk(c.rl_minibatches):
                longest = int(batch.mask[index].sum(1).max())
                inputs, chosen, old, mask = (part[index, :longest] for part in batch[:4])
                loss = policy_loss(learner.log_prob(inputs, chosen), old, advantage[index], mask, c.rl_clip)
                update(learner.model, loss, learner.optimiser)
        # log
        run.log(episodes, c.rl_episodes, "episodes", success=success, decisions=batch.mask.sum(1).mean().item())


def internal_rl(run: Run, base: BaseModel, meta: Metacontroller) -> Policy:
    """Phase 3: train a policy over codes."""
    run.start("rl")  # its seed decides the first weights
    policy = Policy(run.config).to(run.device)
    reinforce(run, "rl", InternalLearner(run, base, meta, policy))
    return policy.requires_grad_(False)


def raw_rl(run: Run, base: BaseModel) -> BaseModel:
    """The baseline: fine-tune a copy of the base on raw actions, with as many episodes."""
    model = BaseModel(run.config).to(run.device)
    model.load_state_dict(base.state_dict())
    reinforce(run, "raw", RawLearner(run, model))
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# Measurements
#
# The method is complete. What follows measures it, draws it and runs it.
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_base(run: Run, base: BaseModel, models: dict) -> dict:
    """How far the base is from the best possible predictor, whether it gets anywhere alone, how good the expert is."""
    episodes, total, count = run.held_out(), 0.0, run.config.eval_episodes
    for part in episodes.chunks():
        total += action_nll(run, base, base(run.tensor(part.obs[:, :-1])), part).sum().item()
    floor, loss = run.world.floor(episodes), total / count
    rng, generator = run.start("evaluate")
    reach = rollout(run, base, Pilot(), run.world.batch(count, rng), generator)
    return {
        **({"base_nats": loss} if floor is None else {"base_excess_nats": loss - floor}),
        "base_reach": float((reach.visited >= 0).any(axis=1).mean()),
        "expert_success": run.world.expert_success(count),
    }


def measure_labels(run: Run, labels: Labels, models: dict) -> dict:
    """Post-training success of ground-truth controllers that are switched by hand, actions at temperature 1."""
    rng, generator = run.start("evaluate")
    batch = run.world.batch(run.config.eval_episodes, rng)
    result = rollout(run, models["pretrain"], LabelPilot(run, len(batch), labels), batch, generator)
    return {"steer_success": result.reward.mean().item()}


def share_near(marks: np.ndarray, others: np.ndarray, tolerance: int) -> float:
    """Share of `marks` (N, T) with one of `others` at most `tolerance` steps away; 0 where there are none."""
    wide = np.pad(others, ((0, 0), (tolerance, tolerance)))
    near = np.lib.stride_tricks.sliding_window_view(wide, 2 * tolerance + 1, axis=1).any(axis=-1)
    return float((marks & near).sum() / max(1, marks.sum()))


@torch.no_grad()
def encode(run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, rng, generator):
    """Codes (N, T, Z), adopted where the gate (N, T) is above the threshold, and KL of the proposals (N, T)."""
    found = []
    for part in episodes.chunks():
        residual, _ = base.lower(run.tensor(part.obs[:, :-1]))
        proposal, entry, kl = propose(run, base, meta, part, rng, generator)
        found.append((*meta.integrate(residual, proposal, entry, run.config.threshold), kl))
    return [torch.cat(column) for column in zip(*found)]


def measure_codes(run: Run, meta: Metacontroller, models: dict) -> dict:
    """Switches against true changes of subgoal, what the codes mean, and what random codes achieve.

    Precision, recall and numbers of switches leave out the first step; KL, read-out and mean codes do not. A random
    switcher, at as many entries, is measured beside. The read-out of the true subgoal from a code is a small MLP's.
    """
    base, c, world = models["pretrain"], run.config, run.world
    rng, generator = run.start("evaluate")
    episodes = run.held_out()
    subgoal, changed = subgoals(world, episodes)
    code, gate, kl = encode(run, base, meta, episodes, rng, generator)
    adopted = (gate > c.threshold).cpu().numpy() & episodes.mask
    switched, later = adopted.copy(), world.entries(episodes.obs)[:, :-1] & episodes.mask
    switched[:, 0] = later[:, 0] = False
    by_chance = (rng.random(later.shape) < switched.sum() / later.sum()) & later
    at, near = run.tensor(adopted), world.tolerance
    named = [code[at & (run.tensor(subgoal) == k)] for k in range(len(world.subgoals))]
    policy = Policy(c).to(run.device)  # its codes are random: it has not learned yet

    def random_codes(count: int, roam: bool) -> Result:
        pilot = CodePilot(run, count, meta, PolicyCodes(run, count, policy, generator))
        return rollout(run, base, pilot, world.batch(count, rng, roam), generator, c.temperature)

    roaming, trials = random_codes(c.eval_episodes, True), random_codes(4 * c.eval_episodes, False)
    table = transition_table(world, roaming.visited)
    print_raster(run, base, meta)
    return {
        "switch_precision": share_near(switched, changed, near),
        "switch_recall": share_near(changed, switched, near),
        "random_switch_precision": share_near(by_chance, changed, near),
        "random_switch_recall": share_near(changed, by_chance, near),
        "switches_per_episode": float(switched.sum() / len(switched)),
        "true_changes_per_episode": float(changed.sum() / len(changed)),
        "kl_per_switch_nats": (kl * at).sum().item() / adopted.sum(),
        "code_accuracy": fit_readout(run, code[at], run.tensor(subgoal)[at]),
        "unseen_transition_probability": float(np.mean([table[pair] for pair in world.transitions(world.post)])),
        "random_code_success": trials.reward.mean().item(),
        "counting_success": world.counting_success,
        "mean_codes": [part.mean(0).nan_to_num().tolist() for part in named],  # of each true subgoal
    }


def transition_table(world: envs.World, visited: np.ndarray) -> np.ndarray:
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


def fit_readout(run: Run, inputs, labels) -> float:
    """Held-out accuracy of a small MLP's read-out; the second half is held out.

    inputs (N, F), labels (N,), in the order of their episodes, so that the halves share at most one.
    """
    half = len(inputs) // 2
    torch.manual_seed(0)
    inputs = (inputs - inputs[:half].mean(0)) / (inputs[:half].std(0) + 1e-6)
    net = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, int(labels.max()) + 1))
    net.to(run.device)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        loss = F.cross_entropy(net(inputs[:half]), labels[:half])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (net(inputs[half:]).argmax(-1) == labels[half:]).float().mean().item()


def print_raster(run: Run, base: BaseModel, meta: Metacontroller) -> None:
    """True subgoals over switch marks (|), for three held-out episodes."""
    episodes = run.held_out().take(np.arange(3))
    subgoal, _ = subgoals(run.world, episodes)
    _, gate, _ = encode(run, base, meta, episodes, *run.start("figures"))
    for i, steps in enumerate(episodes.lengths):
        print("true subgoal  " + "".join(str(g) for g in subgoal[i, :steps]))
        print("gate opens    " + "".join("|" if g > run.config.threshold else "." for g in gate[i, :steps]))


def measure_policy(run: Run, policy: Policy, models: dict) -> dict:
    """Post-training success of the policy, sampled and with its mean codes, on fresh episodes."""
    learner, count = InternalLearner(run, models["pretrain"], models["discover"], policy), 4 * run.config.eval_episodes
    success, mean_success = (learner.collect(count, *run.start("evaluate"), sample)[1] for sample in (True, False))
    return {"internal_rl_success": success, "internal_rl_mean_success": mean_success}


def measure_raw(run: Run, model: BaseModel, models: dict) -> dict:
    """Post-training success of the fine-tuned base on fresh episodes."""
    _, success = RawLearner(run, model).collect(4 * run.config.eval_episodes, *run.start("evaluate"))
    return {"raw_rl_success": success}


# ----------------------------------------------------------------------------------------------------
# Figures (matplotlib is imported here only)
# ----------------------------------------------------------------------------------------------------


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise Failure("pictures need matplotlib: pip install matplotlib (or pass --no-figures, or no --gif)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_cells(axis, world: envs.World, obs) -> None:
    """The cells of an observation (F,): colours with their numbers, and walls."""
    places = world.places(obs)[:-1] - 0.5
    content = np.full((world.size, world.size), -1)
    content[tuple(places.round().astype(int).T[::-1])] = np.arange(len(places))
    edges = (-0.5, world.size - 0.5, world.size - 0.5, -0.5)
    axis.imshow(envs.cell_picture(world, content.reshape(-1), 8), extent=edges)
    for colour, (x, y) in enumerate(places[: world.colours]):
        axis.text(x - 0.4, y - 0.2, str(colour), fontweight="bold")
    axis.set(xticks=[], yticks=[], xlim=edges[:2], ylim=edges[2:])


def code_colours(world: envs.World) -> np.ndarray:
    """The colour of the first cell of each subgoal, (subgoals, 3)."""
    return envs.COLOURS[[goal[0] for goal in world.subgoals]] / 255


def draw_gates(axis, run: Run, models: dict) -> None:
    """The gate over time on three held-out episodes; the shades are the true subgoals."""
    episodes, colours = run.held_out().take(np.arange(3)), code_colours(run.world)
    subgoal, changed = subgoals(run.world, episodes)
    gate = encode(run, models["pretrain"], models["discover"], episodes, *run.start("figures"))[1].cpu().numpy()
    for i, steps in enumerate(episodes.lengths):
        axis.bar(np.arange(steps), 1, 1, -1.3 * i, color=colours[subgoal[i, :steps]], alpha=0.4)
        axis.bar(np.arange(steps), gate[i, :steps], 0.3, -1.3 * i, color="black")
        for t in [0, *np.flatnonzero(changed[i])]:
            axis.text(t - 0.4, 1.03 - 1.3 * i, str(subgoal[i, t]), fontsize=8)
    axis.set(yticks=[], xlabel="step", title="gate (bars) over true subgoal (shade, number), three expert episodes")


def draw_code(axis, run: Run, models: dict, number: int, code) -> None:
    """Where 100 agents are after their first visit, under one code that is held; they start all over one layout."""
    rng, generator = run.start("figures")
    pilot = CodePilot(run, 100, models["discover"], CodesByNumber(run.tensor(np.array([code], dtype=np.float32)), 0))
    heat, batch = run.config.temperature, run.world.scattered(100, rng)
    result = rollout(run, models["pretrain"], pilot, batch, generator, heat, record=True)
    seen, rows, last = result.visited >= 0, np.arange(100), result.mask.sum(axis=1) - 1
    first = seen.argmax(axis=1)
    end = np.where(seen.any(axis=1), np.minimum(first + 1, last), last)
    x, y = run.world.places(result.obs[rows, end].cpu().numpy())[:, -1].T - 0.5 + rng.uniform(-0.2, 0.2, (2, 100))
    goal = run.world.subgoals[number][0]
    draw_cells(axis, run.world, result.obs[0, 0].cpu().numpy())
    axis.plot(x, y, "k.", alpha=0.4)
    share = np.mean(result.visited[rows, first] == goal)
    axis.set_title(f"code {number}: {share:.0%} visit {goal} first", fontsize=10)


def draw_curves(axis, seeds: list[dict]) -> None:
    """Success of each training batch against episodes, a line for each seed; random codes and the expert beside."""
    for name, key, style in (("internal RL", "rl_curve", "C0-"), ("raw-action RL", "raw_curve", "C3--")):
        for i, points in enumerate(metrics[key] for metrics in seeds if metrics.get(key)):
            axis.plot(*zip(*points), style, label=None if i else name)
    for name, key, style in (("the expert", "expert_success", ":"), ("random codes", "random_code_success", "-.")):
        axis.axhline(seeds[0][key], color="grey", linestyle=style, label=name)
    axis.set(xlabel="episodes", ylabel="success", ylim=(-0.03, 1.03), title="RL from one reward at the end")
    axis.legend(loc="center left", fontsize=8)


def draw_picture(run: Run, models: dict, seeds: list[dict], path: Path) -> None:
    """The paper in one picture: when the gate opens, what the codes do, how fast a policy over them learns."""
    codes = seeds[0]["mean_codes"]
    layout = [["gates"] * len(codes), [*range(len(codes))], ["curves"] * len(codes)]
    figure, axes = pyplot().subplot_mosaic(layout, figsize=(9, 9), height_ratios=(2, 3, 3), layout="constrained")
    draw_gates(axes["gates"], run, models)
    for number, code in enumerate(codes):
        draw_code(axes[number], run, models, number, code)
    draw_curves(axes["curves"], seeds)
    write_whole(path, lambda file: figure.savefig(file, dpi=110))
    pyplot().close(figure)


def draw_animation(run: Run, episodes: list[list[tuple]], path: Path, fps: float) -> None:
    """What was watched, animated: the path has the colour of its code, dots are switches, the gate is below."""
    from matplotlib.animation import PillowWriter

    figure, (axis, below) = pyplot().subplots(2, 1, figsize=(3, 3.4), height_ratios=(12, 1), layout="constrained")
    colours, writer = 0.7 * code_colours(run.world), PillowWriter(fps=fps)
    bar = below.barh(0, 1, color="black")[0]
    below.set(xlim=(0, 1), yticks=[], xticks=[], xlabel="gate")
    with writer.saving(figure, path, dpi=80):
        for frames in episodes:
            axis.clear()
            draw_cells(axis, run.world, frames[0][0])
            agent = axis.plot([], [], "ks", markersize=9, zorder=3)[0]
            x, y = run.world.places(np.stack([obs for obs, *_ in frames]))[:, -1].T - 0.5
            for t, (_, number, gate, opened) in enumerate(frames):
                if opened:
                    axis.plot(x[t], y[t], "o", color=colours[number])
                agent.set_data(x[t : t + 1], y[t : t + 1])
                bar.set_width(gate)
                if t % run.world.tolerance == 0 or t == len(frames) - 1:
                    writer.grab_frame()
                axis.plot(x[t : t + 2], y[t : t + 2], color=colours[number])
    pyplot().close(figure)


# ----------------------------------------------------------------------------------------------------
# Watching: a trained run plays, by its policy, under one code, or by hand (--phase watch)
# ----------------------------------------------------------------------------------------------------


class CodesByNumber:
    """Of the codes (K, Z) always the same one, or the one that the person at the keyboard asks for."""

    def __init__(self, codes, number: int | None = None):
        self.codes, self.number = codes, number

    def __call__(self, residual, rows):
        number = self.number
        while number is None:
            answer = input(f"the gate is open: code 0 to {len(self.codes) - 1}? ").strip()
            number = int(answer) if answer.isdecimal() and int(answer) < len(self.codes) else None
        return self.codes[[number]]


class Viewer(CodePilot):
    """Shows the episode that it steers: cells, task, the code in force, `|` where the gate opened. Long episodes are
    shown every few steps. `frames` has an observation, the number of the code, the gate and whether it opened."""

    def __init__(self, run: Run, meta: Metacontroller, choose, codes, fps: float):
        super().__init__(run, 1, meta, choose)
        self.codes, self.fps, self.frames = codes, fps, []

    def show(self) -> None:
        world, batch = self.run.world, self.batch
        marked = " ".join(f"[{c}]" if i == batch.stage[0] else str(c) for i, c in enumerate(world.post))
        task = "" if batch.roam else f", task {marked}"
        print(f"step {len(self.frames)}{task}\n{envs.grid_text(world, batch.content[0], int(batch.cell[0]))}", end="")

    def steer(self, residual, batch):
        t, self.batch = len(self.frames), batch
        shown = batch.entered[0] or t % self.run.world.tolerance == 0
        if shown:
            self.show()
        controlled, opened = super().steer(residual, batch)
        number, gate = int(torch.cdist(self.code, self.codes).argmin()), self.gate.item() if t else 1.0
        self.frames.append((batch.observe()[0], number, gate, bool(opened)))
        if shown:
            print(f"{'|' if opened else '.'} code {number}, gate {gate:.2f}\n", flush=True)
            time.sleep(1 / self.fps if self.fps else 0)
        return controlled, opened

    def select(self, kept) -> None:
        """The one episode has ended: show where the last step led."""
        self.show()
        self.frames.append((self.batch.observe()[0], self.frames[-1][1], 0.0, False))
        super().select(kept)


def watch(run: Run, args) -> int:
    """Play episodes of the post-training task in the terminal; with --gif draw them as well."""
    path = load_saved(run, "watch")
    models = {name: load_model(run, name) for name in TRAINED}
    codes = run.tensor(np.array(run.saved["discover"]["metrics"]["mean_codes"], dtype=np.float32))
    (rng, generator), episodes, solved, fps = run.start("watch"), [], 0, 4 if args.fps is None else args.fps
    held = args.code is not None
    print(f"The trained run {path}. Codes are numbered by the true subgoal that they serve, for display only.\n"
          "@ agent, * agent on a colour, # wall, [ ] the next visit (the policy is not told)\n"
          "| the gate opened: a new code; . the code is held. Ctrl-C ends it.\n")  # fmt: skip
    try:
        for number in range(1, (args.watch_episodes or (1 if held else 3)) + 1):
            by_number = args.by_hand or held
            choose = CodesByNumber(codes, args.code) if by_number else PolicyCodes(run, 1, models["rl"], generator)
            viewer = Viewer(run, models["discover"], choose, codes, fps)
            episodes.append(viewer.frames)
            batch = run.world.batch(1, rng, roam=held)  # one code: also after its goal is reached
            result = rollout(run, models["pretrain"], viewer, batch, generator, run.config.temperature)
            solved += int(result.reward.item())
            visits = "-".join(str(colour) for colour in result.visited[result.visited >= 0]) or "none"
            line = f"{result.mask.sum()} steps, visits {visits}"
            if not held:
                end = "solved" if result.reward.item() else "not solved"
                line = f"{end}, {line}; solved {solved} of {number}"
            print(f"{number}: {line}\n")
    except (EOFError, KeyboardInterrupt):
        print("\nbye")
    seen = [frames for frames in episodes if frames]
    if args.gif and seen:
        write_whole(Path(args.gif), lambda file: draw_animation(run, seen, file, fps or 4))
    return 0


# ----------------------------------------------------------------------------------------------------
# Running: stages, what is saved, flags
# ----------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A run that cannot go on: printed as one line. `status` 2 is bad input, 1 a failed run."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# Offsets that keep random streams apart: a stage depends on (config, seed, the stages that it needs) alone.
STREAMS = {"pretrain": 0, "steer": 1, "discover": 2, "rl": 3, "raw": 4, "evaluate": 6, "figures": 7, "watch": 8}


class Run:
    """What every phase needs besides its inputs: config, seed, device, random streams, log."""

    def __init__(self, config: Config, seed: int, device: torch.device, out: Path | None = None, name=""):
        self.config, self.seed, self.device, self.out = config, seed, device, out
        self.world = replace(envs.WORLDS[config.world], jumps=config.jumps, threads=torch.get_num_threads())
        self.phase, self.started, self.shown = "", time.time(), 0.0
        self.plan = {}  # stages to do, and their typical minutes
        self.name, self.saved = name, {}  # {stage: its config, seed, model and metrics}, see `load_saved`
        self._held_out, self.curves = None, {}

    def start(self, phase: str) -> tuple[np.random.Generator, torch.Generator]:
        """Begin a phase: seed everything for it; returns a numpy and a torch generator."""
        number = 1000 * self.seed + STREAMS[phase]
        torch.manual_seed(number)
        self.phase, self.started, self.shown = phase, time.time(), 0.0
        return np.random.default_rng(number), torch.Generator(self.device).manual_seed(number)

    def tensor(self, array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def held_out(self) -> envs.Episodes:
        """Expert trajectories for evaluation: the same for every seed, never trained on."""
        if self._held_out is None:
            self._held_out = self.world.held_out(self.config.eval_episodes)
        return self._held_out

    def log(self, step: int, total: int, unit: str, **metrics) -> None:
        """Show progress at most every 10 seconds (and at the end) and append it to metrics.csv."""
        elapsed = time.time() - self.started
        if step < total and elapsed - self.shown < 10:
            return
        self.shown = elapsed
        left, stages, whole = elapsed / step * max(0, total - step), [*self.plan], ""
        place = stages.index(self.phase) + 1 if self.phase in stages else 0
        if self.plan.get(self.phase):  # later stages take longer than typical by as much as this one does
            later = sum(self.plan[name] for name in stages[place:]) / self.plan[self.phase]
            whole = f", whole run {(left + later * (elapsed + left)) / 60:.1f} min"
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        speed = f"{step / max(elapsed, 1e-9):,.3g} {unit}/s"
        print(f"{place}/{len(stages)} {self.phase:9s}{step:>8,}/{total:,} {unit}  {values}  {speed}; left: "
              f"phase {left:.0f} s{whole}", flush=True)  # fmt: skip
        if self.out:
            with open(self.out / "metrics.csv", "a", newline="", encoding="utf-8") as file:
                rows = ((self.phase, step, round(elapsed, 1), name, value) for name, value in metrics.items())
                csv.writer(file).writerows(rows)


class Stage(NamedTuple):
    """A part of a run that depends on (config, seed, earlier stages) and is done once."""

    phase: str  # the --phase it belongs to
    needs: tuple[str, ...]  # earlier stages whose models it takes
    last: str  # the last config field it depends on: changing a later one leaves what is saved valid
    run: object  # function (run, *needed models) -> model
    build: object  # config -> untrained model, to load a saved one into
    measure: object  # function (run, model, models so far) -> metrics


STAGES = {
    "pretrain": Stage("pretrain", (), "jumps", pretrain, BaseModel, measure_base),
    "steer": Stage("pretrain", ("pretrain",), "steer_lr", steer, Labels, measure_labels),
    "discover": Stage("discover", ("pretrain",), "threshold", discover, Metacontroller, measure_codes),
    "rl": Stage("rl", ("pretrain", "discover"), "rl_clip", internal_rl, Policy, measure_policy),
    "raw": Stage("rl", ("pretrain",), "raw_lr", raw_rl, BaseModel, measure_raw),
}
NORMALISED = "steer_success", "internal_rl_success", "internal_rl_mean_success", "raw_rl_success"


def write_whole(path: Path, write) -> None:
    """Write a file whole or not at all; `write` gets the path of a temporary one."""
    temporary = path.with_name("new-" + path.name)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        raise Failure(f"{path}: cannot write it ({getattr(error, 'strerror', None) or 'disk full?'})", 1) from None


def write_json(path: Path, content) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


TRAINED = "pretrain", "discover", "rl"  # what it takes to watch a run
SHIPPED = Path(__file__).parent / "results"  # where trained runs lie that come with the code


def check_origin(run: Run, name: str, content: dict, path: Path, advice: str) -> None:
    """Raise Failure if a saved stage belongs to another config or seed."""
    theirs = {"seed": content["seed"], **content["config"]}
    for field, ours in {"seed": run.seed, **asdict(run.config)}.items():
        if theirs.get(field) != ours:
            raise Failure(f"{path}: made with --{field}={theirs.get(field)}, this run has {ours}; {advice}")
        if field == STAGES[name].last:
            return


def load_saved(run: Run, phase: str) -> Path:
    """Fill `run.saved` with the stages that are done: those in OUT/run.pt. Where that file (or OUT) is missing and
    `phase` needs earlier stages, they are those of the trained run in results/. Returns the file. Writes nothing.

    Raises Failure if the file is damaged, belongs to another config or seed, or lacks what `phase` needs.
    """
    wanted = [name for name, stage in STAGES.items() if phase in ("all", stage.phase)]
    needed = {need for name in wanted for need in STAGES[name].needs if need not in wanted}
    needed = {*TRAINED} if phase == "watch" else needed
    mine = (run.out or SHIPPED) / "run.pt"
    own = os.path.exists(mine)  # False for a name that cannot be one, too
    path = SHIPPED / f"{run.name}.pt" if needed and not own else mine
    try:
        run.saved = torch.load(path, map_location=run.device) if os.path.exists(path) else {}
        run.saved = {name: run.saved[name] for name in STAGES if name in run.saved and (own or name in needed)}
        if any({*content} != {"config", "seed", "model", "metrics"} for content in run.saved.values()):
            raise KeyError
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Failure(f"{path}: not a run of ours ({type(error).__name__}); delete it to begin anew") from None
    for name, content in run.saved.items():
        check_origin(run, name, content, path, "choose another --out" if own else "run --phase pretrain here first")
    missing = [STAGES[name].phase for name in STAGES if name in needed and name not in run.saved]
    if missing:
        raise Failure(f"--phase {phase}: {mine} is not there or lacks --phase {missing[0]}; run that first")
    typical = typical_minutes(run.name)
    run.plan = {name: typical.get(name, 0.0) for name in wanted if name not in run.saved}
    return path


def typical_minutes(name: str) -> dict[str, float]:
    """Minutes of each stage in the runs whose results come with the code, to tell how long this one may take."""
    path = SHIPPED / f"{name}.json"
    seeds = json.loads(path.read_text(encoding="utf-8"))["seeds"] if path.exists() else []
    return {stage: float(np.mean([seed.get(f"minutes_{stage}", 0) for seed in seeds])) for stage in STAGES if seeds}


def load_model(run: Run, name: str) -> nn.Module:
    """The frozen model of a saved stage."""
    model = STAGES[name].build(run.config).to(run.device)
    model.load_state_dict(run.saved[name]["model"])
    return model.requires_grad_(False)


def numbers(metrics: dict) -> dict:
    """The metrics that are one number each: without curves and codes."""
    return {name: value for name, value in metrics.items() if not isinstance(value, list)}


def run_stage(run: Run, name: str, models: dict) -> dict:
    """Load the stage if it is finished, else do it and save it. Adds its model to `models`, returns its metrics."""
    if name in run.saved:
        models[name] = load_model(run, name)
        print(f"{name}: done before")
        return run.saved[name]["metrics"]
    stage, started = STAGES[name], time.time()
    models[name] = stage.run(run, *(models[need] for need in stage.needs))
    minutes = (time.time() - started) / 60
    metrics = {**stage.measure(run, models[name], models), f"minutes_{name}": minutes}
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers(metrics).items()), flush=True)
    if not all(math.isfinite(value) for value in numbers(metrics).values()):
        raise Failure(f"{name}: not a finite number: {numbers(metrics)}; lower the learning rate", 1)
    if name in run.curves:
        metrics[f"{name}_curve"] = run.curves[name]
    plain = json.loads(json.dumps(metrics, default=float))  # no numpy scalars: torch.load refuses them
    run.saved[name] = {
        "config": asdict(run.config), "seed": run.seed, "model": models[name].state_dict(), "metrics": plain
    }  # fmt: skip
    write_whole(run.out / "run.pt", lambda file: torch.save(run.saved, file))
    return plain


def run_seed(run: Run, phase: str) -> dict:
    """All stages of `phase` for one seed, resuming what is finished; returns the metrics so far."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise Failure(f"--out {run.out}: cannot write there ({getattr(error, 'strerror', error)})") from None
    write_json(run.out / "config.json", {"seed": run.seed, **asdict(run.config)})
    models, metrics = {}, {"seed": run.seed}
    for name, stage in STAGES.items():
        if phase in ("all", stage.phase) or name in run.saved:
            metrics |= run_stage(run, name, models)
    expert = max(metrics.get("expert_success", 1.0), 1e-9)
    metrics |= {f"{key}_normalised": metrics[key] / expert for key in NORMALISED if key in metrics}
    metrics["minutes"] = sum(value for name, value in metrics.items() if name.startswith("minutes_"))
    write_json(run.out / "results.json", metrics)
    return metrics


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit status 2."""

    def error(self, message):
        raise Failure(message)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return text.lower() == "true"


def between(kind, least, most):
    """A parser of numbers from `least` to `most`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # lies between no bounds
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be from {least:,} to {most:,}")
        return value

    return parse


WATCH = "watch_episodes", "fps", "by_hand", "code", "gif"  # flags of --phase watch


def config_comments() -> dict[str, str]:
    """The comment beside each field of Config is its help text."""
    source = Path(__file__).read_text(encoding="utf-8").split("class Config:")[1].split("\nCLASSROOM")[0]
    halves = [line.strip().split("  # ") for line in source.splitlines()]
    return {half[0].split(":")[0]: half[1] for half in halves if len(half) == 2}


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Internal RL (arXiv 2512.20605): pretrain, discover, reinforce inside the model.",
        allow_abbrev=False,
    )
    parser.add_argument("--env", choices=list(PRESETS), default="grid", help="which tasks")
    parser.add_argument("--preset", choices=list(PRESETS["grid"]), default="classroom", help="sizes and schedules")
    parser.add_argument("--phase", default="all", help="what to run",
                        choices=["pretrain", "discover", "rl", "all", "watch"])  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="shrink the preset to a smoke run of under a minute")
    parser.add_argument("--seed", default="0", help="seed, or several: 0,1,2 (then results of all are collected)")
    parser.add_argument("--out", help="folder of results (default: runs/ENV-PRESET, and seed-K in it)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=between(int, 0, 256), default=0, help="of the CPU (0: PyTorch's default)")
    parser.add_argument("--no-figures", action="store_true", help="do not draw (matplotlib is not needed then)")
    group = parser.add_argument_group("with --phase watch, of a trained run")
    group.add_argument("--watch_episodes", type=between(int, 1, 10**6), help="how many [3; one with --code]")
    group.add_argument("--fps", type=between(float, 0, 1000), help="steps shown in a second, 0: no waiting [4]")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--by_hand", action="store_true", default=None, help="you choose the codes, by their numbers")
    either.add_argument("--code", type=between(int, 0, 99), help="this code and no other")
    group.add_argument("--gif", help="also write an animated picture to this file")
    group = parser.add_argument_group("config fields (defaults: preset classroom)")
    comments = config_comments()
    for f in fields(Config):
        kind, text = type(f.default), f"{comments[f.name]} [{f.default}]".replace("%", "%%")
        parse = between(kind, *BOUNDS[f.type]) if f.type in BOUNDS else boolean if kind is bool else str
        group.add_argument(
            f"--{f.name}", type=parse, choices=CHOICES.get(f.name), help=text, metavar=kind.__name__.upper()
        )
    return parser


def make_config(args) -> Config:
    if args.preset not in PRESETS[args.env]:
        raise Failure(f"--preset {args.preset}: --env {args.env} has {', '.join(PRESETS[args.env])}")
    config = PRESETS[args.env][args.preset]
    if args.fast:
        config = replace(config, **FAST)
    config = replace(config, **{f.name: value for f in fields(Config) if (value := getattr(args, f.name)) is not None})
    if config.control_block > config.layers:
        raise Failure(f"--control_block={config.control_block}: must be at most --layers={config.layers}")
    if config.dim % config.heads:
        raise Failure(f"--dim={config.dim}: must be a multiple of --heads={config.heads}")
    if envs.WORLDS[config.world].kind != args.env:
        raise Failure(f"--world={config.world}: not a world of --env {args.env}")
    return config


def make_device(name: str) -> torch.device:
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise Failure("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and found else "cpu")


def describe_machine() -> str:
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "mujoco", "gymnasium")}
    return {"python": platform.python_version(), **packages}


def peak_memory_gb() -> float:
    """Most memory that this process has had; not known on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def print_summary(metrics: dict) -> None:
    print("--- results")
    for name, value in numbers(metrics).items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"peak_memory_gb: {peak_memory_gb():.2f}")


def main(argv=None) -> int:
    try:
        return run_command(make_parser().parse_args(argv), argv)
    except Failure as failure:
        print(f"internal_rl: {failure}", file=sys.stderr)
        return failure.status
    except BrokenPipeError:  # whoever read the output, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("internal_rl: interrupted; the same command resumes after the last finished phase", file=sys.stderr)
        return 130


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise Failure(f"--seed {text}: must be a number, or several such as 0,1,2") from None
    if not 0 <= min(seeds) <= max(seeds) < 10**6 or len(set(seeds)) < len(seeds):
        raise Failure(f"--seed {text}: must be different numbers between 0 and 999999")
    return seeds


def run_command(args, argv) -> int:
    config, device, seeds = make_config(args), make_device(args.device), parse_seeds(args.seed)
    alien = [name for name in WATCH if args.phase != "watch" and getattr(args, name) is not None]
    if alien:
        raise Failure(f"--{alien[0]}: belongs to --phase watch")
    if args.gif and Path(args.gif).suffix != ".gif":
        raise Failure(f"--gif {args.gif}: must end in .gif")
    if args.phase == "watch" and len(seeds) > 1:
        raise Failure(f"--seed {args.seed}: --phase watch shows one")
    if args.code is not None and args.code >= len(envs.WORLDS[config.world].subgoals):
        raise Failure(f"--code {args.code}: there are {len(envs.WORLDS[config.world].subgoals)}, the first is 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers next to zero are slow and mean nothing here
    if args.gif or not (args.no_figures or args.phase == "watch"):
        pyplot()  # say at once if it is missing
    folder = Path(args.out or f"runs/{args.env}-{args.preset}{'-fast' if args.fast else ''}")
    alone = len(seeds) == 1 and args.out
    print(f"internal_rl: --env {args.env} --preset {args.preset}; {versions()}; {describe_machine()}; "
          f"{torch.get_num_threads()} threads; {device}; to {folder}")  # fmt: skip
    name = f"{args.env}-{args.preset}"
    runs = [Run(config, seed, device, folder if alone else folder / f"seed-{seed}", name=name) for seed in seeds]
    if args.phase == "watch":
        return watch(runs[0], args)
    for run in runs:
        load_saved(run, args.phase)  # a mismatch must stop us before anything is written
    results = []
    for run in runs:
        results.append(run_seed(run, args.phase))
        print_summary(results[-1])
    if not args.no_figures and {*TRAINED} <= {*runs[0].saved}:
        models = {stage: load_model(runs[0], stage) for stage in TRAINED}
        draw_picture(runs[0], models, results, (folder if len(runs) > 1 else runs[0].out) / "picture.png")
    if not alone:
        command = "python internal_rl.py " + " ".join(sys.argv[1:] if argv is None else argv)
        summary = {"preset": args.preset, "command": command, "machine": describe_machine(), "versions": versions()}
        write_json(folder / f"{name}.json", {**summary, "seeds": [numbers(metrics) for metrics in results]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
