"""Statistics of experts on text: moments of their inputs and hidden activations, loads, saliency, samples.

The model reads text once. Each MoE layer's router says which tokens go where, and what an expert makes of them is computed
next to the layer from its weights, so that the model itself stays as it is. One process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_samoe.fit.expert_math import chosen, hidden_of, output_of, with_one
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.experts import ExpertShape, weights_of
from megatron_samoe.moe.router import Routing
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights

#: Takes (MoE layer, expert, its rows x_NH, the weights gate_N that it has in their tokens' sums).
Visitor = Callable[[int, int, Tensor, Tensor], None]


@dataclass
class LayerCalibration:
    """Sums of one layer's E experts; D = H and C = F, one more each where experts have biases (a 1 is appended).

    Attributes:
        tokens_E: that chose each expert.
        input_EDD: sum of x x' in fp32.
        hidden_ECC: sum of a a', with a between the expert's matrices.
        saliency_E: sum of gate * norm of output (REAP, arXiv:2510.13999); over tokens_E it is the saliency.
        key_ER: rank in the lot that keeps R of an expert's tokens, each with equal chance; below 0 without one.
        sample_in_ERH, sample_out_ERH: the kept tokens' inputs, and the expert's outputs.
    """

    tokens_E: Tensor
    input_EDD: Tensor
    hidden_ECC: Tensor
    saliency_E: Tensor
    key_ER: Tensor
    sample_in_ERH: Tensor
    sample_out_ERH: Tensor

    @staticmethod
    def empty(shape: ExpertShape, num_samples: int) -> LayerCalibration:
        """Returns a calibration without tokens."""
        E, H, R, more = shape.num_experts, shape.hidden_size, num_samples, int(shape.bias)
        D, C = H + more, shape.ffn_size + more
        return LayerCalibration(
            torch.zeros(E, dtype=torch.float64),
            torch.zeros(E, D, D),
            torch.zeros(E, C, C),
            torch.zeros(E, dtype=torch.float64),
            torch.full((E, R), -1.0),
            torch.zeros(E, R, H),
            torch.zeros(E, R, H),
        )

    def add(self, expert: int, x_NH: Tensor, a_NF: Tensor, y_NH: Tensor, gate_N: Tensor, key_N: Tensor) -> None:
        """Adds an expert's tokens, each with its number in the lot."""
        has_bias = self.input_EDD.shape[-1] > x_NH.shape[-1]
        self.tokens_E[expert] += len(x_NH)
        for sums, rows in ((self.input_EDD, x_NH), (self.hidden_ECC, a_NF)):
            rows = with_one(rows, has_bias)
            sums[expert].addmm_(rows.T, rows)
        self.saliency_E[expert] += float((gate_N.double() * y_NH.double().norm(dim=1)).sum())
        keys, kept = torch.cat((self.key_ER[expert], key_N)).topk(self.key_ER.shape[1])
        self.key_ER[expert] = keys
        for samples, rows in ((self.sample_in_ERH, x_NH), (self.sample_out_ERH, y_NH)):
            samples[expert] = torch.cat((samples[expert], rows))[kept]

    def samples(self, expert: int) -> tuple[Tensor, Tensor]:
        """Returns the kept inputs and outputs of an expert, [n, H] each; n is 0 where no token chose it."""
        is_kept = self.key_ER[expert] >= 0
        return self.sample_in_ERH[expert][is_kept], self.sample_out_ERH[expert][is_kept]

    @property
    def mean_saliency_E(self) -> Tensor:
        """REAP's saliency: the mean over an expert's tokens; 0 for one that no token chose."""
        return self.saliency_E / self.tokens_E.clamp_min(1)


def calibration_bytes(shapes: Sequence[ExpertShape], num_samples: int) -> int:
    """Returns the bytes that the sums of all layers take."""
    with torch.device("meta"):
        layers = [LayerCalibration.empty(shape, num_samples) for shape in shapes]
    return sum(sums.nbytes for layer in layers for sums in vars(layer).values())


def calibrate(model: RankModel, passes: Sequence[Tensor], num_samples: int, seed: int) -> list[LayerCalibration]:
    """Returns statistics of the experts of each MoE layer on text.

    Args:
        passes: ids [B, S + 1] of each forward pass.
        num_samples: R, tokens that are kept of each expert.
    """
    layers = model.moe_layers()
    found = [LayerCalibration.empty(layer.moe.shape, num_samples) for layer in layers]
    lot = torch.Generator().manual_seed(seed)
    weights = [own_experts(layer.moe.experts) for layer in layers]

    def take(index: int, expert: int, x_NH: Tensor, gate_N: Tensor) -> None:
        of_expert, activation = chosen(weights[index], slice(expert, expert + 1)), layers[index].moe.shape.activation
        a_1NF = hidden_of(of_expert, x_NH, activation)
        y_NH = output_of(of_expert, a_1NF)[0]
        found[index].add(expert, x_NH, a_1NF[0], y_NH, gate_N, torch.rand(len(x_NH), generator=lot))

    visit(model, passes, take)
    return found


def own_experts(part: torch.nn.Module) -> ExpertWeights:
    """Returns the weights that a layer owns, in fp32."""
    return weights_of(dict(part.named_parameters())).map(lambda t: t.detach().float())


@dataclass
class OutputSums:
    """The data that the second matrix of each expert is fitted on once the first has changed.

    Attributes:
        hidden_ECC: sum of b b' in fp32, with b between the matrices of the new expert.
        cross_EHC: sum of y b', with y the old expert's output.
        power_E: sum of |y|^2.
    """

    hidden_ECC: Tensor
    cross_EHC: Tensor
    power_E: Tensor


def output_sums(
    model: RankModel, passes: Sequence[Tensor], new: Sequence[ExpertWeights], activation: Activation
) -> list[OutputSums]:
    """Returns sums for each MoE layer; `new` are experts that replace the model's, of which w1 and b1 count."""
    layers = model.moe_layers()
    old = [own_experts(layer.moe.experts) for layer in layers]
    found = []
    for layer in layers:
        shape = layer.moe.shape
        E, H, C = shape.num_experts, shape.hidden_size, shape.ffn_size + int(shape.bias)
        sums = OutputSums(torch.zeros(E, C, C), torch.zeros(E, H, C), torch.zeros(E, dtype=torch.float64))
        found.append(sums)

    def take(index: int, expert: int, x_NH: Tensor, gate_N: Tensor) -> None:
        one, sums = slice(expert, expert + 1), found[index]
        before, after = chosen(old[index], one), chosen(new[index], one)
        y_NH = output_of(before, hidden_of(before, x_NH, activation))[0]
        b_NC = with_one(hidden_of(after, x_NH, activation)[0], after.b1 is not None)
        sums.hidden_ECC[expert].addmm_(b_NC.T, b_NC)
        sums.cross_EHC[expert].addmm_(y_NH.T, b_NC)
        sums.power_E[expert] += float(y_NH.double().square().sum())

    visit(model, passes, take)
    return found


@torch.no_grad()
def visit(model: RankModel, passes: Sequence[Tensor], visitor: Visitor) -> None:
    """Reads text, and shows the visitor the tokens of each expert of each MoE layer, in fp32."""

    def seen(index: int, router: torch.nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        x_TH, ids_TK = inputs[0].float(), routing.ids_TK
        for expert in range(int(ids_TK.max()) + 1):
            rows, columns = (ids_TK == expert).nonzero(as_tuple=True)
            if len(rows):
                visitor(index, expert, x_TH[rows], routing.probs_TK[rows, columns].float())

    with ExitStack() as hooks:
        for index, layer in enumerate(model.moe_layers()):
            hooks.callback(layer.moe.router.register_forward_hook(partial(seen, index)).remove)
        for ids_BS in passes:
            model(ids_BS[:, :-1], ForwardContext(batch_size=len(ids_BS)))
