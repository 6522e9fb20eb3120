"""The stages of a compression, one after the other: calibrate, choose a map, match, fit, write what to compare with, judge.

Each leaves its result in the folder and is not done again. Healing comes between: it is the trainer's, which the command
line runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from megatron_samoe.config.derived import num_moe_layers
from megatron_samoe.config.sharing_map import ExpertSource, parse_sharing, word_of
from megatron_samoe.convert.edited_model import EditedModel, with_sharing
from megatron_samoe.convert.formats import NATIVE
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import ConfigError, in_units
from megatron_samoe.fit.calibration import LayerCalibration, calibrate, calibration_bytes, output_sums
from megatron_samoe.fit.compress import baselines
from megatron_samoe.fit.compress.compressible import expert_bytes, require_compressible
from megatron_samoe.fit.compress.fitting import fit_bytes, fit_inputs, fit_outputs, pair_errors, with_inputs
from megatron_samoe.fit.compress.judge import Verdict, losses
from megatron_samoe.fit.compress.options import CompressOptions, plan_of, refuse_options, texts
from megatron_samoe.fit.compress.sharing_plan import SharingPlan, chosen_map, sets_in_budget
from megatron_samoe.fit.compress.stage_folder import BEGIN, IMPORTED, StageFolder
from megatron_samoe.fit.matching import MatchedLayer, best_numbering, in_order
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.fit.shared_model import FittedGroup, SharedGroup, renumbered_model, shared_groups, shared_model
from megatron_samoe.fit.surgery.pool import pool_moe, tie_layers
from megatron_samoe.log import logger
from megatron_samoe.models.blueprint import Blueprint
from megatron_samoe.models.mlp import activation_of
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.ops.grouped_mlp import Activation
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.parsing import JsonObject
from megatron_samoe.runtime.free_memory import free_memory_bytes
from megatron_samoe.runtime.load import load_model


class Compression:
    """A compression in its folder.

    Raises:
        ConfigError: the model cannot be compressed, or the options are not legal for it.
        DataError: the text is too short, or of another tokenizer.
        CheckpointError: the checkpoint is missing, or the folder is another's.
    """

    def __init__(self, options: CompressOptions):
        self.options = options
        opened = open_folder(options.load_dir, options.ckpt_step)
        self.source, self.directory = opened.model, opened.directory
        self.config = require_compressible(self.source)
        self.num_layers = num_moe_layers(self.config)
        tokenizer = tokenizer_of(opened.data)
        self.texts = texts(options, self.config, int(self.source.train_state["vocab_size"]), tokenizer)
        refuse_options(options, self.layer_bytes, self.num_layers)
        self.folder = StageFolder(Path(options.save_dir))
        begun = {"load_dir": str(self.directory.resolve())}
        self.folder.stage(BEGIN, begun, lambda: {})
        if opened.kind != NATIVE:  # healing trains from checkpoints
            self.folder.stage(IMPORTED, begun, self._import)
            opened = self.folder.model(IMPORTED)
            self.source, self.directory = opened.model, opened.directory

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's experts."""
        return expert_bytes(self.source) // self.num_layers

    def sources(self, plan: SharingPlan) -> tuple[ExpertSource, ...]:
        """Returns where each MoE layer's experts come from."""
        return parse_sharing(plan.sharing, self.num_layers)

    def _import(self) -> JsonObject:
        self.folder.write_model(IMPORTED, self.source)
        return {}

    def _model(self, folder: str | Path) -> RankModel:
        return load_model(open_folder(folder), single_process_state()).model

    def require_teacher(self, folder: str) -> None:
        """Raises ConfigError where a model was trained with another tokenizer than the one that is compressed."""
        teacher = open_folder(folder, words=LoadWords("--teacher "))
        if teacher.kind != NATIVE:
            raise ConfigError(
                "--teacher", folder, f"is {teacher.described}; it must be a run: convert it with megatron-samoe convert"
            )
        own, other = (
            (m.train_state.get("vocab_size"), {n: b for n, b in m.attachments.items() if "tokenizer" in n})
            for m in (self.source, teacher.tensors)
        )
        if own != other:
            raise ConfigError(
                "--teacher", folder, "has another tokenizer than the model of --load-dir; it must have the same"
            )

    def errors(self) -> tuple[JsonObject, list[list[float]] | None]:
        """Returns what each layer that shares loses of w1 and w2, and what pairs of layers lose where a map was chosen."""
        lost = self.folder.result("fitted")["lost_of_layer"]
        return lost, self.folder.result("plan").get("error_LL")

    # 1. Calibrate

    @cached_property
    def calibration(self) -> list[LayerCalibration]:
        """Statistics of the experts of each MoE layer."""
        self.folder.stage("calibration", self._calibration_settings(), self._calibrate)
        names = [f.name for f in fields(LayerCalibration)]
        return [LayerCalibration(**{n: layer[n] for n in names}) for layer in self.folder.read_tensors("calibration")]

    def _calibration_settings(self) -> JsonObject:
        names = ("data_path", "calibration_tokens", "num_samples", "seed")
        return {name: getattr(self.options, name) for name in names}

    def _calibrate(self) -> JsonObject:
        self._state_memory()
        model = self._model(self.directory)
        found = calibrate(model, self.texts.calibration, self.options.num_samples, self.options.seed)
        self.folder.write_tensors("calibration", [vars(layer) for layer in found])
        least = min(int(layer.tokens_E.min()) for layer in found)
        width = self.config.model.hidden_size
        few = f"; an expert met {least:,} tokens, fewer than its {width} inputs: more text would help"
        note = few if least < width else ""
        logger.info(f"calibration: {sum(p[:, 1:].numel() for p in self.texts.calibration):,} tokens{note}")
        return {
            "tokens_LE": [layer.tokens_E.tolist() for layer in found],
            "saliency_LE": [layer.mean_saliency_E.tolist() for layer in found],
        }

    def _state_memory(self) -> None:
        vocab_size = int(self.source.train_state["vocab_size"])
        shapes = Blueprint(self.config, vocab_size, single_process_state(), compute_dtype(self.config)).expert_shapes
        needed = calibration_bytes(shapes, self.options.num_samples)
        shape = shapes[0]
        C, rows = shape.ffn_size + shape.bias, (2 if shape.activation == "swiglu" else 1) * shape.ffn_size
        D = shape.hidden_size + shape.bias
        banks = plan_of(self.options, self.layer_bytes, self.num_layers).num_banks
        fit = max(fit_bytes(len(shapes), shape.num_experts, *sizes, banks) for sizes in ((rows, D), (D, C)))
        model = sum(t.num_bytes for n, t in self.source.tensors.items() if not n.startswith("optimizer."))
        free = free_memory_bytes(torch.device("cpu"))
        logger.info(
            f"memory: calibration {in_units(needed, 'B')} beside the model's {in_units(model, 'B')}, the fit then about "
            f"{in_units(fit, 'B')} besides; {in_units(free, 'B')} are free"
        )
        if needed + model > free:
            raise ConfigError(
                "--load-dir",
                self.options.load_dir,
                f"takes {in_units(needed + model, 'B')} to calibrate, and {in_units(free, 'B')} are free",
            )

    # 2. Choose and match

    @cached_property
    def plan(self) -> SharingPlan:
        """Which layers share what."""
        options = self.options
        settings = {
            "expert_sharing": options.sharing,
            "num_expert_banks": options.num_banks,
            "num_expert_sets": options.num_sets,
            "budget": options.budget,
            "choose_map": options.choose_map,
            "match": options.match,
        }
        result = self.folder.stage("plan", settings, self._choose)
        return SharingPlan(result["sharing"], result["num_banks"])

    def _choose(self) -> JsonObject:
        if not self.options.choose_map:
            return asdict(plan_of(self.options, self.layer_bytes, self.num_layers))
        word = word_of(self.options.sharing)
        assert self.options.budget is not None and word is not None
        way = word.way
        error_LL = pair_errors(self._layers(), self._activation, way, self.options.match, self._num_groups)
        sets = sets_in_budget(self.options.budget, self.layer_bytes, self.num_layers)
        plan = SharingPlan(chosen_map(error_LL, sets, way))
        logger.info(f"plan: {plan.sharing}")
        return {**asdict(plan), "error_LL": error_LL.tolist()}

    @property
    def _num_groups(self) -> int:
        return self.config.moe.moe_router_num_groups or 1

    @property
    def _activation(self) -> Activation:
        return activation_of(self.config.model)

    def _layers(self) -> list[MatchedLayer]:
        """Returns the experts of each MoE layer with their statistics, in the original's numbering."""
        experts = LayerExperts(self.source)
        return [MatchedLayer(experts.weights(p), c) for p, c in zip(experts.layers, self.calibration, strict=True)]

    def groups(self) -> list[SharedGroup]:
        """Returns the MoE layers that share, by what they share."""
        return shared_groups(self.sources(self.plan), self.plan.num_banks)

    def matched(self) -> Opened:
        """Returns the original in a common numbering, which computes the same."""
        self.folder.stage("matched", self._plan_settings(), self._match)
        return self.folder.model("matched")

    def _plan_settings(self) -> JsonObject:
        return {**self._calibration_settings(), **asdict(self.plan), "match": self.options.match}

    def _fit_settings(self) -> JsonObject:
        return {**self._plan_settings(), "no_refit": self.options.no_refit}

    def _match(self) -> JsonObject:
        layers, activation = self._layers(), self._activation
        numberings: dict[int, Numbering] = {}
        for group in self.groups():
            members, way = [layers[i] for i in group.layers], group.source.way
            found = best_numbering(members, activation, self.options.match, way, group.num_banks, self._num_groups)
            numberings |= dict(zip(group.layers, found, strict=True))
        self.folder.write_tensors("numbering", {i: (n.experts_E, n.neurons_EF) for i, n in numberings.items()})
        self.folder.write_model("matched", renumbered_model(self.source, numberings))
        moved = {i: n.num_moved for i, n in numberings.items()}
        logger.info(f"matched: {sum(moved.values())} experts of {len(moved)} layers renumbered")
        return {"renumbered": moved}

    # 3. Fit

    def fitted(self) -> Opened:
        """Returns the compressed model, not healed."""
        self.matched()
        self.folder.stage("fitted", self._fit_settings(), self._fit)
        return self.folder.model("fitted")

    def _fit(self) -> JsonObject:
        matched, groups = self.folder.model("matched"), self.groups()
        kept = self.folder.read_tensors("numbering")
        numberings = {i: Numbering(*order) for i, order in kept.items()}
        layers = [
            in_order(layer, numberings[i]) if i in numberings else layer for i, layer in enumerate(self._layers())
        ]
        inputs = [fit_inputs([layers[i] for i in g.layers], g.source.way, g.num_banks) for g in groups]
        sums = None
        if not self.options.no_refit:
            new = [layer.weights for layer in layers]
            for group, fit in zip(groups, inputs, strict=True):
                for number, index in enumerate(group.layers):
                    new[index] = with_inputs(layers[index], fit, number)
            sums = output_sums(self._model(matched.directory), self.texts.calibration, new, self._activation)
        fitted = []
        for group, fit in zip(groups, inputs, strict=True):
            theirs = None if sums is None else [sums[i] for i in group.layers]
            outputs = fit_outputs([layers[i] for i in group.layers], group.source.way, group.num_banks, theirs)
            fitted.append(FittedGroup(group, (fit, outputs)))
        sources = self.sources(self.plan)
        moe = replace(
            self.config.moe, num_expert_banks=self.plan.num_banks, samoe_granularity="layer", samoe_normalization="none"
        )
        config = with_sharing(replace(self.config, moe=moe), sources)
        self.folder.write_model("fitted", shared_model(matched.model, config, sources, fitted))
        return {"lost_of_layer": _losses(fitted)}

    # 4. What to compare with

    def others(self) -> list[str]:
        """Returns the names of models of equal bytes that were made by other means; a line says which cannot be made."""
        result = self.folder.stage("others", self._plan_settings(), self._make_others)
        return list(result["models"])

    def _make_others(self) -> JsonObject:
        models = []
        try:
            self.folder.write_model("blind", self._blind())
            models.append("blind")
        except ConfigError as error:
            logger.info(f"others: no blind model: {error}")
        try:
            kept = baselines.experts_in_budget(self.source, expert_bytes(self.fitted().model))
        except ConfigError as error:
            logger.info(f"others: neither pruned nor merged: {error}")
            return {"models": models, "experts": None}
        self.folder.write_model("pruned", baselines.pruned_model(self.source, self.calibration, kept))
        self.folder.write_model("merged", baselines.merged_model(self.source, self.calibration, kept))
        return {"models": [*models, "pruned", "merged"], "experts": kept}

    def _blind(self) -> EditedModel:
        plan = self.plan
        if any(source.way.combines for source in self.sources(plan)):
            return pool_moe(self.source, plan.num_banks, sharing=plan.sharing)
        return tie_layers(self.source, plan.sharing)

    def folder_of(self, model: str) -> Path:
        """Returns the checkpoint of the original, or of a stage's model."""
        return self.directory if model == "original" else self.folder.model(model).directory

    # 5. Judge

    def judge(self, healed: Mapping[str, Path]) -> list[Verdict]:
        """Returns the verdict on each model: the original, the matched and fitted, the others, and healed ones by folder."""
        options = self.options
        self.fitted()
        others = self.others()
        folders = {n: self.folder_of(n) for n in ("original", "matched", "fitted", *others)} | dict(healed)
        settings = {
            **self._fit_settings(),
            "valid_data_path": options.valid_data_path,
            "judge_tokens": options.judge_tokens,
            "judge_start": self.texts.start,
        }
        original = None
        verdicts = []
        for name, folder in folders.items():
            # Each verdict is a stage of its own: healed models come later.
            def work(name: str = name, folder: Path = folder) -> JsonObject:
                nonlocal original
                original = original or self._model(self.directory)
                model = original if name == "original" else self._model(folder)
                loss, divergence = losses(original, model, self.texts.judged)
                return asdict(Verdict(name, self._bytes(name, folder), loss, divergence))

            which = settings | ({"healed": str(open_folder(folder).directory)} if name in healed else {})
            verdicts.append(Verdict(**self.folder.stage(f"judged-{name}", which, work)))
        return verdicts

    def _bytes(self, name: str, folder: Path) -> int:
        if name == "merged":  # clusters are counted once
            return expert_bytes(self.folder.model("pruned").model)
        return expert_bytes(open_folder(folder).model)


def _losses(fitted: Sequence[FittedGroup]) -> JsonObject:
    """Returns for each layer that shares what w1 and w2 lose: root of the share of their products' power."""
    return {
        str(index): [float(fit.relative_L[number]) for fit in one.fits]
        for one in fitted
        for number, index in enumerate(one.group.layers)
    }
