"""Measures speed against limits, plain torch and other programs in the same run.

Each figure is a median over rounds in which all variants run in turn, so that other load on the machine meets them
alike. Only ratios of one run count: a column "a / b" is a's speed over b's. Every benchmark prints a table; --json keeps
the figures and the conditions of the run.
"""

from __future__ import annotations

from megatron_samoe.cli.program import Commands, Group
from tools.benchmarks.all_to_all import AllToAll
from tools.benchmarks.checkpoint import CheckpointBenchmark
from tools.benchmarks.decode import Decode
from tools.benchmarks.dispatch import Dispatch
from tools.benchmarks.expert_parallel import ExpertParallel
from tools.benchmarks.gpu_budget import GpuBudget
from tools.benchmarks.layer import MoELayerBenchmark
from tools.benchmarks.megatron_core import MegatronCore
from tools.benchmarks.muon import MuonBenchmark
from tools.benchmarks.ops import AdamW, CrossEntropy, DocumentAttention, Linear, Pool
from tools.benchmarks.parallel import Bubble, StepTime
from tools.benchmarks.prompt import Prompt
from tools.benchmarks.ring_attention import RingAttention
from tools.benchmarks.roofline import Roofline
from tools.benchmarks.serve import Serve
from tools.benchmarks.train import TrainStep

_TRAINING = (MoELayerBenchmark, TrainStep, Roofline, ExpertParallel, AllToAll, Dispatch, RingAttention, MegatronCore)
_OPS = (Pool, Linear, CrossEntropy, DocumentAttention, AdamW, MuonBenchmark, GpuBudget)
_OTHERS = (Decode, Prompt, Serve, CheckpointBenchmark)
_PARALLEL = Group({one.name: one for one in (Bubble, StepTime)}, "parallel layouts against theory and the planner")
_ALL: dict[str, Commands] = {one.name: one for one in (*_TRAINING, *_OPS, *_OTHERS)}
BENCHMARKS = _ALL | {"parallel": _PARALLEL}
