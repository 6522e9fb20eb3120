"""MLPs and mixtures of experts of a SaMoE language model: W[l, e] = sum_b A[l, b] T[b, e] where layers combine banks.

Shapes: T tokens, H hidden, F ffn, E experts, P banks, G coefficients' groups (experts or one), K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Weights(nn.Module):
    """A weight and maybe a bias; the last dim of the weight is the input."""

    def __init__(self, shape, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:-1])) if bias else None

    def forward(self, x):
        """Returns x W^T + b with the output dims joined."""
        return F.linear(x, self.weight.flatten(0, -2), None if self.bias is None else self.bias.flatten())


def activate(h, gated):
    """Returns the activation of pre-activations [..., F], or [..., 2 F] with the gate first."""
    if gated:
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(h, approximate="tanh")


def up_shape(config, width):
    """Returns the output dims of an MLP's first matrix."""
    return (2, width) if config.hidden_act == "swiglu" else (width,)


class MLP(nn.Module):
    """The dense MLP, also used as shared expert."""

    def __init__(self, config, width):
        super().__init__()
        self.gated = config.hidden_act == "swiglu"
        self.fc1 = Weights((*up_shape(config, width), config.hidden_size), config.linear_bias)
        self.fc2 = Weights((config.hidden_size, width), config.linear_bias)

    def forward(self, x):
        """Returns y of x's shape."""
        return self.fc2(activate(self.fc1(x), self.gated))


def expert_parameters(config, *leading):
    """Returns w1 [..., E, (2,) F, H], w2 [..., E, H, F] and maybe b1, b2; `leading` ends with E."""
    up = up_shape(config, config.moe_intermediate_size)
    shapes = {"w1": (*leading, *up, config.hidden_size),
              "w2": (*leading, config.hidden_size, config.moe_intermediate_size)}  # fmt: skip
    if config.linear_bias:
        shapes |= {"b1": (*leading, *up), "b2": (*leading, config.hidden_size)}
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})


class ExpertPool(nn.Module):
    """What MoE layers share: banks of experts [P, E, ...] that they combine, and sets [1, E, ...] that they use; kept in fp32,
    as in training."""

    def __init__(self, config):
        super().__init__()
        sources = [source for source in config.expert_sources() if source is not None]
        banks = {(config.num_expert_banks, experts) for way, _, experts in sources if way == "combined"}
        if banks:
            self.bank = expert_parameters(config, *banks.pop())
        sets = {str(number): experts for way, number, experts in sources if way in ("tied", "scaled")}
        if sets:
            self.set = nn.ModuleDict({n: expert_parameters(config, 1, experts) for n, experts in sorted(sets.items())})

    def expert(self, source, name, index, coefficients, dtype):
        """Returns an expert's weight: sum_b a[b] T[b, index] with coefficients [2, G, P], the first row for w1 and b1; or the
        set's as it is."""
        bank = (self.bank if source[0] == "combined" else self.set[str(source[1])])[name][:, index]
        if coefficients is None:
            return bank[0].to(dtype)
        rows = coefficients[0 if name in ("w1", "b1") else 1]
        a_P = rows[index if rows.shape[0] > 1 else 0]
        return torch.tensordot(a_P.to(bank.dtype), bank, dims=1).to(dtype)


class Router(Weights):
    """Scores of a token's experts, in fp32."""

    def __init__(self, config, num_experts):
        super().__init__((num_experts, config.hidden_size), False)
        self.config = config
        if config.router_expert_bias:
            self.expert_bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self.has_candidates = config.pool_lock_step is not None or config.neighbour_unmask_steps > 0
        if self.has_candidates:
            self.candidates = nn.Parameter(torch.ones(num_experts), requires_grad=False)
        if config.router_score_function == "norm":
            self.scale = nn.Parameter(torch.ones(1))
        if config.router_score_function == "relu":
            self.loss_weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x_TH):
        """Returns the weights and ids of each token's K experts; -1 where a token has fewer."""
        config = self.config
        logits_TE = F.linear(x_TH.float(), self.weight.float())
        if config.router_score_function == "norm":
            logits_TE = self.scale.float() * F.normalize(logits_TE, dim=1)
        if self.has_candidates:
            factors_E, multiplies = self.candidates.float(), config.router_score_function in ("norm", "relu")
            logits_TE = logits_TE * factors_E if multiplies else logits_TE + factors_E.log()
        key_TE = self.key(logits_TE)
        chosen = None if config.router_score_function == "relu" else config.num_experts_per_tok
        ids_TK = key_TE.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
        probs_TK, ids_TK = self.weigh(logits_TE, ids_TK)
        return probs_TK if config.router_scaling_factor is None else probs_TK * config.router_scaling_factor, ids_TK

    @torch.no_grad()
    def key(self, logits_TE):
        """Returns what experts are chosen by: logits; with biases or groups, biased scores in the best groups alone."""
        config = self.config
        if not config.router_expert_bias and config.router_num_groups is None:
            return logits_TE
        key_TE = logits_TE
        if config.router_score_function == "sigmoid":
            key_TE = logits_TE.sigmoid()
        elif config.router_score_function == "softmax" and (config.router_pre_softmax or config.router_expert_bias):
            key_TE = logits_TE.softmax(-1)
        if config.router_expert_bias:
            key_TE = key_TE + self.expert_bias.float()
        if self.has_candidates:
            key_TE = key_TE.masked_fill(self.candidates == 0, -torch.inf)
        if config.router_num_groups is not None:
            key_TE = self.in_best_groups(key_TE)
        return key_TE.masked_fill(logits_TE <= 0, -torch.inf) if config.router_score_function == "norm" else key_TE

    def in_best_groups(self, key_TE):
        """Returns the keys with -inf outside each token's best groups."""
        config = self.config
        key_TGE = key_TE.unflatten(1, (config.router_num_groups, -1))
        best = config.num_experts_per_tok // config.router_group_topk
        open_Tg = key_TGE.topk(best, dim=-1).values.sum(-1).topk(config.router_group_topk, dim=-1).indices
        is_open_TG = torch.zeros(key_TGE.shape[:2], dtype=torch.bool, device=key_TE.device).scatter_(1, open_Tg, True)
        return key_TGE.masked_fill(~is_open_TG[:, :, None], -torch.inf).flatten(1)

    def weigh(self, logits_TE, ids_TK):
        """Returns the weights of chosen experts, and their ids."""
        config, chosen_TK = self.config, logits_TE.gather(1, ids_TK)
        if config.router_score_function in ("norm", "relu"):
            return chosen_TK.relu(), ids_TK.masked_fill(chosen_TK <= 0, -1)
        if config.router_score_function == "sigmoid":
            # Over their sum they are a softmax of their logarithms, where small ones do not vanish.
            return (chosen_TK.sigmoid() if config.router_pre_softmax else F.logsigmoid(chosen_TK).softmax(1)), ids_TK
        return (logits_TE.softmax(1).gather(1, ids_TK) if config.router_pre_softmax else chosen_TK.softmax(1)), ids_TK


class MoE(nn.Module):
    """Routed experts, own or shared, and an optional expert for every token, which `mixing` may weigh against them.

    Args:
        source: way, number of the set, and number of experts.
    """

    def __init__(self, config, source):
        super().__init__()
        self.config, self.source = config, source
        way, _, num_experts = source
        self.gated = config.hidden_act == "swiglu"
        self.router = Router(config, num_experts)
        width = config.shared_expert_intermediate_size or (config.intermediate_size if config.residual_mlp else None)
        self.shared_expert = None if width is None else MLP(config, width)
        if config.residual_mlp or config.shared_expert_gate:
            self.mixing = Weights((2 if config.residual_mlp else 1, config.hidden_size), config.residual_mlp)
        if way == "combined":
            groups = num_experts if config.samoe_granularity == "expert" else 1
            self.combination = nn.Parameter(torch.zeros(2, groups, config.num_expert_banks))
        elif way == "scaled":
            self.combination = nn.Parameter(torch.zeros(2, 1, 1))
        elif way == "own":
            self.experts = expert_parameters(config, num_experts)

    def forward(self, x_TH, pool):
        """Returns y_TH."""
        probs_TK, ids_TK = self.router(x_TH)
        coefficients = self.coefficients()
        y_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
        for index in ids_TK[ids_TK >= 0].unique().tolist():
            tokens, place = (ids_TK == index).nonzero(as_tuple=True)
            rows = self.run_expert(x_TH[tokens], index, pool, coefficients)
            y_TH = y_TH.index_add(0, tokens, rows.to(y_TH.dtype) * probs_TK[tokens, place, None].to(y_TH.dtype))
        y_TH = y_TH.to(x_TH.dtype)
        if self.shared_expert is None:
            return y_TH
        if self.config.shared_expert_gate:
            gate_T1 = F.linear(x_TH.float(), self.mixing.weight.float()).sigmoid().to(x_TH.dtype)
            return y_TH + gate_T1 * self.shared_expert(x_TH)
        if not self.config.residual_mlp:
            return y_TH + self.shared_expert(x_TH)
        c_T2 = F.linear(x_TH.float(), self.mixing.weight.float(), self.mixing.bias.float()).softmax(-1).to(x_TH.dtype)
        return c_T2[:, :1] * y_TH + c_T2[:, 1:] * self.shared_expert(x_TH)

    def coefficients(self):
        """Returns the weights of banks [2, G, P], or the factors on a set [2, 1, 1]; None without either."""
        way = self.source[0]
        if way in ("own", "tied"):
            return None
        raw, normalization = self.combination, self.config.samoe_normalization if way == "combined" else "none"
        if normalization == "softmax":
            return raw.softmax(-1)
        if normalization == "l2":
            return raw / raw.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return raw

    def run_expert(self, x_RH, index, pool, coefficients):
        """Returns one expert's y_RH."""

        def weight(name):
            if self.source[0] == "own":
                return self.experts[name][index]
            return pool.expert(self.source, name, index, coefficients, x_RH.dtype)

        bias = self.config.linear_bias
        h = F.linear(x_RH, weight("w1").flatten(0, -2), weight("b1").flatten() if bias else None)
        return F.linear(activate(h, self.gated), weight("w2"), weight("b2") if bias else None)
