"""The teacher of a student: a trained model that reads the same micro-batches and is never trained.

Its layers lie over the student's ranks. Between pipeline stages its activations are rows below
the student's in the same message, of the student's width. They come back with no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.loading import load_checkpoint, load_newest
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor, sharded
from megatron_samoe.dist_checkpointing.teacher import SavedTeacher, find_teacher
from megatron_samoe.log import logger
from megatron_samoe.models.blueprint import ModelParts
from megatron_samoe.models.rank_model import RankModel, stored_name
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.tensor_parallel.kl_divergence import vocab_parallel_kl_divergence
from megatron_samoe.tensor_parallel.layers import VocabParallelEmbedding, padded_vocab_size


@dataclass(frozen=True)
class Teacher:
    """One rank's part of a teacher.

    Attributes:
        weight: of the divergence in the loss, temperature's square included.
    """

    model: RankModel
    temperature: float
    weight: float

    def num_rows(self, tokens: int, hidden_size: int) -> int:
        """Returns the rows of a message that the activations of `tokens` tokens take."""
        return math.ceil(tokens * self.model.config.model.hidden_size / hidden_size)

    def pack(self, x_TH: Tensor, teacher_TH: Tensor) -> Tensor:
        """Returns a message: the student's x_TH, and below it the teacher's activations."""
        flat = teacher_TH.reshape(-1)
        padding = flat.new_zeros(-len(flat) % x_TH.shape[1])
        return torch.cat((x_TH, torch.cat((flat, padding)).view(-1, x_TH.shape[1])))

    def unpack(self, message: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns the student's part of a message, and the activations of the teacher, of `tokens` tokens."""
        rows, width = self.num_rows(tokens, message.shape[1]), self.model.config.model.hidden_size
        taught = message.detach()[len(message) - rows :].reshape(-1)
        return message[: len(message) - rows], taught[: tokens * width].view(tokens, width)

    @torch.no_grad()
    def forward(
        self, x: Tensor, batch_size: int, positions_BS: Tensor | None, document_ids_BS: Tensor | None, chunk: int
    ) -> Tensor:
        """Returns what one of its chunks makes of tokens or activations, without noise and without dropping tokens."""
        context = ForwardContext(batch_size=batch_size)
        y, _ = self.model(x, context, positions_BS, document_ids_BS, chunk=chunk)
        return y

    def divergence(self, logits_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        """Returns kl_T of the student's logits, at the temperature and unweighted."""
        return vocab_parallel_kl_divergence(logits_TV, teacher_TV, self.temperature, self.model.state.tp)


def refuse_unfit(config: PretrainConfig, vocab_size: int, world_size: int, parts: ModelParts) -> None:
    """Raises what `load_teacher` would, except for damaged files, before any data is read or model built.

    Args:
        parts: of the student.
    """
    assert config.distillation.teacher is not None
    saved = find_teacher(config.distillation.teacher)
    saved.on_ranks_of(config, vocab_size, world_size)
    _parts(saved, parts)


def load_teacher(config: PretrainConfig, student: RankModel) -> Teacher:
    """Returns the teacher that a run asks for, in the layout and precision of its student; all ranks call it together.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has parts that this program does not know.
        ConfigError: it cannot teach this student: see `SavedTeacher.on_ranks_of`.
    """
    options, parallel, folder = config.distillation, student.state, config.distillation.teacher
    assert folder is not None

    def load(problems_of: store.Problems) -> tuple[SavedTeacher, RankModel]:
        saved = find_teacher(folder, problems_of)
        settled = saved.on_ranks_of(config, student.vocab_size, parallel.world_size)
        model = RankModel(settled, student.vocab_size, parallel, student.dtype, _parts(saved, student.parts))
        load_checkpoint(saved.directory, _tensors_to_load(model, saved), parallel)
        return saved, model

    saved, model = load_newest(load, parallel)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model.begin_step()
    logger.info(
        f"{saved.directory} teaches"
        + (f" until iteration {options.teacher_until}" if options.teacher_until is not None else "")
        + f", at temperature {options.teacher_temperature:g} and weight {options.teacher_weight:g}"
    )
    return Teacher(model, options.teacher_temperature, options.teacher_weight * options.teacher_temperature**2)


def _parts(saved: SavedTeacher, of_student: ModelParts) -> ModelParts:
    """Returns the parts of a teacher's model: the package's own, or the student's where it was trained with those."""
    if saved.parts and saved.parts == dict(of_student.replaced()):
        return of_student
    store.refuse_parts({store.PARTS: saved.parts}, str(saved.directory))
    return ModelParts()


def _tensors_to_load(model: RankModel, saved: SavedTeacher) -> dict[str, list[ShardedTensor]]:
    """Returns by name which part of each of the checkpoint's tensors this rank loads, and into what. A vocabulary's padding is left out:
    teacher and student may pad to different sizes."""
    tensors = {
        name: sharded(p, tag_of(p).shard, model.state, tag_of(p).slice) for name, p in model.global_parameters().items()
    }
    divisible_by = saved.trained.model.make_vocab_size_divisible_by
    stored_rows = padded_vocab_size(saved.vocab_size, divisible_by)
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            rows, shape = module.num_used_rows, (stored_rows, module.weight.shape[1])
            part = ShardedTensor(module.weight.detach()[:rows], shape, (module.first_id, 0), is_owner=False)
            tensors[stored_name(f"{name}.weight")] = [part] if rows else []
    return tensors
