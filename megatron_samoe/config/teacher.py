"""A teacher's configuration on its student's ranks: pure arithmetic."""

from __future__ import annotations

from dataclasses import replace

from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.derived import uneven_layout, virtual_stages
from megatron_samoe.config.option import LARGEST
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError, ConfigErrors


def on_ranks_of(student: PretrainConfig, teacher: PretrainConfig, world_size: int) -> PretrainConfig:
    """Returns the configuration in which a teacher runs with a student: its model, and of all else what a model that is
    not trained needs.

    It is spread over the student's ranks. Its layers are spread evenly over the student's number of virtual stages, whose
    activations travel together. Its vocabulary is padded as the student's, so that ranks hold the same part of both.

    Raises:
        ConfigErrors: naming the teacher's options that do not fit the student's layout or sequences.
    """
    layout, is_dense = student.parallel, teacher.moe.expert_layout == "dense"
    stages = virtual_stages(layout, student.model.num_layers)
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context_parallel_size,
        cp_comm_type=layout.cp_comm_type,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        pipeline_model_parallel_layout=uneven_layout(teacher.model.num_layers, stages) if stages > 1 else None,
        expert_model_parallel_size=1 if is_dense else layout.expert_model_parallel_size,
        expert_tensor_parallel_size=None if is_dense else layout.expert_tensor_parallel_size,
        pipeline_schedule=layout.pipeline_schedule,
    )
    model = replace(
        teacher.model,
        seq_length=student.model.seq_length,
        max_position_embeddings=teacher.model.max_positions,
        attention_dropout=0.0,  # nothing is dropped where nothing is trained, whatever a layout refuses
        make_vocab_size_divisible_by=student.model.make_vocab_size_divisible_by,
    )
    given = student.training
    training = TrainingConfig(
        micro_batch_size=given.micro_batch_size,
        global_batch_size=given.global_batch_size,
        bf16=given.bf16,
        fp16=given.fp16,
        train_iters=LARGEST,  # whatever its routers did at some step, it is behind them
    )
    # Its loads are not balanced any more, over however many sequences; its weights stay, so they are combined once.
    moe = replace(teacher.moe, moe_aux_loss_group_size=None, pool_lock_entropy_group_size=None, samoe_combine="step")
    config = PretrainConfig(model, moe, parallel, training, data=DataConfig(mock_data=True))
    try:
        validate(config, world_size)
    except ConfigErrors as errors:
        raise ConfigErrors(
            [ConfigError(f"the teacher's {error.field}", error.value, error.allowed) for error in errors.errors]
        ) from None
    return config
