"""MLPs and mixtures of experts of a SaMoE language model: W[l, e] = sum_b A[l, b] T[b, e] where layers combine banks.

Shapes: T tokens, H hidden, F ffn, E experts, P banks, G coefficients' groups (experts or one), K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def activate(h, kind):
    """Returns hidden_act's activation of pre-activations [..., F], or of swiglu's [..., 2 F] with the gates first."""
    if kind == "swiglu":
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """The dense MLP, also used as shared expert."""

    def __init__(self, config, width):
        super().__init__()
        self.gate_proj, self.act = None, config.hidden_act
        if config.hidden_act == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.linear_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.linear_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.linear_bias)

    def forward(self, x):
        """Returns y of x's shape."""
        if self.gate_proj is None:
            return self.down_proj(activate(self.up_proj(x), self.act))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def without_autocast(x):
    """Returns a context in which a trainer's autocast rounds nothing: as in training, routers and banks are in fp32."""
    return torch.autocast("cpu" if x.device.type in ("meta", "mps") else x.device.type, enabled=False)


def fp32_linear(x, weight, bias=None):
    """Returns x times a weight, and a bias if there is one, in fp32."""
    with without_autocast(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def run_experts(x_TH, ids_TK, weights_TK, num_experts, run):
    """Returns y_TH: for each token the sum of its experts' results times their weights.

    Args:
        run: returns expert e's y_RH of x_RH.
    """
    y_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
    weights_TK = weights_TK.to(y_TH.dtype)
    if torch.compiler.is_compiling():  # which experts are hit is not known: all run on all tokens
        for index in range(num_experts):
            weights_T = weights_TK.masked_fill(ids_TK != index, 0.0).sum(1)
            y_TH = y_TH + weights_T[:, None] * run(index, x_TH).to(y_TH.dtype)
        return y_TH.to(x_TH.dtype)
    is_used_TK = weights_TK != 0
    for index in ids_TK[is_used_TK].unique().tolist():
        tokens, place = ((ids_TK == index) & is_used_TK).nonzero(as_tuple=True)
        rows = run(index, x_TH[tokens]).to(y_TH.dtype)
        y_TH = y_TH.index_add(0, tokens, rows * weights_TK[tokens, place, None])
    return y_TH.to(x_TH.dtype)


class Experts(nn.Module):
    """The experts of a layer or of a set, packed: gate_up_proj [E, 2 F, H] with the gates first (up_proj [E, F, H] without
    gates), down_proj [E, H, F], and maybe biases. Banks are packed alike, one after the other: their first dim is P E.

    vLLM computes every module named `experts` with gated SiLU and without biases, where no parameter but of three dims
    tells otherwise: experts of other kinds have other names (`experts_name`).
    """

    def __init__(self, config, num_experts, num_banks=1):
        super().__init__()
        self.act, self.gated, self.num_experts = config.hidden_act, config.hidden_act == "swiglu", num_experts
        packed = num_banks * num_experts
        hidden, width = config.hidden_size, config.moe_intermediate_size
        up, rows = ("gate_up_proj", 2 * width) if self.gated else ("up_proj", width)
        shapes = {up: (packed, rows, hidden), "down_proj": (packed, hidden, width)}
        if config.linear_bias:
            shapes |= {f"{up}_bias": (packed, rows), "down_proj_bias": (packed, hidden)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.up, self.has_bias = up, config.linear_bias

    def forward(self, hidden_states, top_k_index, top_k_weights, scale=None, a_2GP=None):
        """Returns y_TH of x_TH, ids_TK and weights_TK.

        All uses go through here: adapters and offloading put the weights in place around a module's forward alone.

        Args:
            scale: factor on the first matrices and biases; 1 if not given.
            a_2GP: where these are banks, their weights in each expert; the first row is for the first matrices.
        """
        dtype = hidden_states.dtype

        def run(index, x_RH):
            def weight(name):
                packed = getattr(self, name)
                if a_2GP is None:
                    return packed[index].to(dtype)
                rows = a_2GP[1 if name.startswith("down") else 0]
                a_P = rows[index if rows.shape[0] > 1 else 0]
                with without_autocast(packed):
                    return torch.tensordot(a_P.to(packed.dtype), packed[index :: self.num_experts], dims=1).to(dtype)

            return self.run(x_RH, weight, scale)

        return run_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, run)

    def run(self, x_RH, weight, scale=None):
        """Returns y_RH of one expert, whose weights `weight` gives by name."""
        h = F.linear(x_RH, weight(self.up), weight(f"{self.up}_bias") if self.has_bias else None)
        h = h if scale is None else h * scale.to(h.dtype)
        bias = weight("down_proj_bias") if self.has_bias else None
        return F.linear(activate(h, self.act), weight("down_proj"), bias)


def experts_name(config):
    """Returns the name of packed experts: one that says what they compute."""
    plain = config.hidden_act == "swiglu" and not config.linear_bias
    one_size = not isinstance(config.num_experts, (list, tuple)) and all(
        source is None or source.num_experts == config.num_experts for source in config.expert_sources()
    )
    return "experts" if plain and one_size else "unlike_experts"


class ExpertSet(nn.Module):
    """Experts that several layers use."""

    def __init__(self, config, num_experts):
        super().__init__()
        self.config = config
        self.add_module(experts_name(config), Experts(config, num_experts))


class ExpertPool(nn.Module):
    """What MoE layers share: banks of experts [P E, ...] that they combine, and sets [E, ...] that they use; kept in fp32,
    as in training."""

    def __init__(self, config):
        super().__init__()
        shared = {source.bank: source for source in config.expert_sources() if source and source.bank}
        sets = {bank.partition(".")[2]: source for bank, source in shared.items() if not source.combines}
        for bank, source in shared.items():
            if source.combines:
                self.add_module(bank, Experts(config, source.num_experts, source.num_banks))
        if sets:
            self.sets = nn.ModuleDict({n: ExpertSet(config, sets[n].num_experts) for n in sorted(sets)})

    def experts_of(self, source):
        """Returns the experts that a layer uses, or the banks that it combines."""
        lent = self.get_submodule(source.bank)
        return lent if source.combines else getattr(lent, experts_name(lent.config))


class Lent:
    """A pool as layers are given it. A module among a module's arguments would be moved to its device, and one that is
    offloaded to disk cannot be."""

    def __init__(self, pool):
        self.pool = pool


class Router(nn.Module):
    """Scores of a token's experts in fp32, and the choice by them.

    Choosing is a second call: vLLM replaces a router whose forward gives it the choice of an input, and would leave out
    biases, groups and factors. It is a call of the module all the same, since offloading puts parameters in place for these.
    """

    def __init__(self, config, num_experts):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        if config.router_expert_bias:
            self.expert_bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self.has_candidates = config.pool_lock_step is not None or config.neighbour_unmask_steps > 0
        if self.has_candidates:
            self.candidates = nn.Parameter(torch.ones(num_experts), requires_grad=False)
        if config.router_score_function == "norm":
            self.scale = nn.Parameter(torch.ones(1))
        if config.router_score_function == "relu":
            self.loss_weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x_TH, logits_TE=None):
        """Returns logits [T, E]; given these, the chosen experts' weights and ids [T, K]."""
        if logits_TE is not None:
            return self.choose(logits_TE)
        config = self.config
        logits_TE = fp32_linear(x_TH, self.weight)
        if config.router_score_function == "norm":
            logits_TE = self.scale.float() * F.normalize(logits_TE, dim=1)
        if not self.has_candidates:
            return logits_TE
        factors_E, multiplies = self.candidates.float(), config.router_score_function in ("norm", "relu")
        return logits_TE * factors_E if multiplies else logits_TE + factors_E.log()

    def choose(self, logits_TE):
        """Returns the weights and ids of each token's K experts; weight 0 where a token has fewer."""
        config = self.config
        key_TE = self.key(logits_TE)
        chosen = None if config.router_score_function == "relu" else config.num_experts_per_tok
        ids_TK = key_TE.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
        probs_TK = self.weigh(logits_TE, ids_TK)
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
        """Returns the weights of chosen experts."""
        config, chosen_TK = self.config, logits_TE.gather(1, ids_TK)
        if config.router_score_function in ("norm", "relu"):
            return chosen_TK.relu()
        if config.router_score_function == "sigmoid":
            # Over their sum they are a softmax of their logarithms, where small ones do not vanish.
            return chosen_TK.sigmoid() if config.router_pre_softmax else F.logsigmoid(chosen_TK).softmax(1)
        return logits_TE.softmax(1).gather(1, ids_TK) if config.router_pre_softmax else chosen_TK.softmax(1)


class Mixing(nn.Module):
    """Logits in fp32 that weigh the expert which every token passes."""

    def __init__(self, config):
        super().__init__()
        rows = 2 if config.residual_mlp else 1
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(rows)) if config.residual_mlp else None

    def forward(self, x_TH):
        """Returns logits [T, 1 or 2]."""
        return fp32_linear(x_TH, self.weight, self.bias)


class MoE(nn.Module):
    """Routed experts, own or shared, and an optional expert for every token, which `mixing` may weigh against them.

    Args:
        source: an `ExpertSource` of the configuration.
    """

    def __init__(self, config, source):
        super().__init__()
        self.config, self.source = config, source
        num_experts = source.num_experts
        self.router = Router(config, num_experts)
        width = config.shared_expert_intermediate_size or (config.intermediate_size if config.residual_mlp else None)
        self.shared_expert = None if width is None else MLP(config, width)
        if config.residual_mlp or config.shared_expert_gate:
            self.mixing = Mixing(config)
        if source.bank is None:
            self.add_module(experts_name(config), Experts(config, num_experts))
        elif source.normalization is not None:
            groups = num_experts if source.combines and config.samoe_granularity == "expert" else 1
            self.combination = nn.Parameter(torch.zeros(2, groups, source.num_banks))

    def forward(self, hidden_states, lent=None):
        """Returns y of x's shape [..., H] and the router's logits [T, E]; `lent` is what layers share."""
        x_TH = hidden_states.flatten(0, -2)
        logits_TE = self.router(x_TH)  # called twice: for logits, then for the choice; see Router
        probs_TK, ids_TK = self.router(x_TH, logits_TE)
        y_TH = self.mixed(x_TH, self.routed(x_TH, ids_TK, probs_TK, lent and lent.pool))
        return y_TH.view(hidden_states.shape), logits_TE

    def routed(self, x_TH, ids_TK, probs_TK, pool):
        """Returns the sum of each token's experts."""
        source, a = self.source, self.coefficients()
        experts = getattr(self, experts_name(self.config)) if source.bank is None else pool.experts_of(source)
        if source.combines:
            return experts(x_TH, ids_TK, probs_TK, a_2GP=a)
        if a is None:
            return experts(x_TH, ids_TK, probs_TK)
        first, second = a.flatten()
        if self.config.linear_bias:
            return experts(x_TH, ids_TK, probs_TK * second, scale=first)
        # Without a bias the factors belong to the input and to the weights, and whoever computes experts can compute these.
        return experts(x_TH * first.to(x_TH.dtype), ids_TK, probs_TK * second)

    def mixed(self, x_TH, y_TH):
        """Returns y_TH and the expert that every token passes."""
        if self.shared_expert is None:
            return y_TH
        if self.config.shared_expert_gate:
            return y_TH + self.mixing(x_TH).sigmoid().to(x_TH.dtype) * self.shared_expert(x_TH)
        if not self.config.residual_mlp:
            return y_TH + self.shared_expert(x_TH)
        c_T2 = self.mixing(x_TH).softmax(-1).to(x_TH.dtype)
        return c_T2[:, :1] * y_TH + c_T2[:, 1:] * self.shared_expert(x_TH)

    def coefficients(self):
        """Returns the weights of banks [2, G, P], or the factors on a set [2, 1, 1]; None without either."""
        normalization = self.source.normalization
        if normalization == "softmax":
            return self.combination.softmax(-1)
        if normalization == "l2":
            return self.combination / self.combination.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return None if normalization is None else self.combination

    def own_experts(self, pool):
        """Returns the layer's experts as if no other used them, [E, ...] by name."""
        num_experts, a = self.source.num_experts, self.coefficients()
        experts = pool.experts_of(self.source).named_parameters()
        if a is None:
            return {n: w * 1.0 for n, w in experts}
        rows = [row.expand(num_experts, -1) for row in a]
        return {
            n: torch.einsum("ep,pe...->e...", rows[n.startswith("down")].to(w.dtype), w.unflatten(0, (-1, num_experts)))
            for n, w in experts
        }
