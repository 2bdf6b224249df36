"""The Backpack language model: every token has K sense vectors that know no context; a GPT-2 only decides how much each one counts.

    C(x)       = K vectors of width D, from the embedding E[x] alone               the sense network
    h          = GPT-2(x_1 ... x_T), [q; k] = W h + b                              the trunk, and one linear map on top of it
    α_{k,i,j}  = softmax over j <= i of  q_{k,i} · k_{k,j} / sqrt(D / K)           contextualisation, for each sense by itself
    o_i        = Σ_k Σ_{j <= i} α_{k,i,j} C(x_j)_k
    p(x_{i+1}) = softmax(E o_i)                                                    no norm, bias or temperature in between

α does not depend on C, so the logits are linear in the sense vectors: what an edit of one of them does can be computed exactly.

Hewitt, Thickstun, Manning and Liang 2023, Backpack Language Models, ACL, https://arxiv.org/abs/2305.16765 (the general form, the
parametrisation of senses and of contextualisation). As in the model that they published, the sense network has a second residual with a
norm (by accident, they say), block i of the trunk (from 0) divides its attention scores by i + 1 besides, and one E is the embedding of
the trunk, that of the sense network, and the head.

Parameters have the names of the published checkpoint (stanfordnlp/backpack-gpt2): `BackpackLMHeadModel.from_pretrained(folder)` and
`load_state_dict` read it. Its config calls itself "gpt2", so AutoModel cannot know it; save it once from here and AutoModel does.

Unlike the published code: attention masks, padding on either side, labels and a cache exist; a token that must not be seen has weight
exactly 0, not exp(-10000); in training, dropout acts once on what the MLP in the sense block gives, not twice in a row, and not on LN_0(e).

The cache has one layer more than the trunk has blocks: the keys of the contextualisation, and the sense vectors in the place of values.

File legend: N texts, T tokens, S tokens seen so far (cached ones and these), K senses, D width, H heads, C width of one head or sense,
V vocabulary, R overridden tokens.
"""

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple


class BackpackConfig(PreTrainedConfig):  # type: ignore[misc]
    """Names and defaults as in the published config.json: GPT-2's, and three of its own. Raises ValueError if the width cannot be divided.

    num_senses                 K; the width must be a multiple of it
    sense_intermediate_scale   inner width of the last MLP of the sense network, in widths
    num_overrides              tokens whose sense vectors are overridden by a table in the checkpoint (see `Overrides`)
    """

    model_type = "backpack"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(  # not the fields of a dataclass: transformers 5.0 does not read those
        self,
        vocab_size: int = 50264,
        n_positions: int = 512,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        num_senses: int = 16,
        sense_intermediate_scale: int = 4,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        scale_attn_by_inverse_layer_idx: bool = True,
        num_overrides: int = 0,
        use_cache: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | list[int] | None = 50256,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **more: Any,
    ) -> None:
        for name, parts in (("n_head", n_head), ("num_senses", num_senses)):
            if parts < 1 or n_embd % parts:
                raise ValueError(f"n_embd ({n_embd}) must be a multiple of {name} ({parts}).")
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.num_senses = num_senses
        self.sense_intermediate_scale = sense_intermediate_scale
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.num_overrides = num_overrides
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**more)


def _normalised(scores_NHTS: Tensor, seen_NTS: Tensor) -> Tensor:
    """Softmax over the tokens that may be seen; the others get exactly 0. Every row sees its own token at least."""
    return scores_NHTS.masked_fill(~seen_NTS.unsqueeze(1), -torch.inf).softmax(-1)


class MLP(nn.Module):
    """`width` -> `inner` -> `out`."""

    def __init__(self, config: BackpackConfig, inner: int, out: int) -> None:
        super().__init__()
        self.c_fc = Conv1D(inner, config.n_embd)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = Conv1D(out, inner)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.act(self.c_fc(x))))
        return out


class Attention(nn.Module):
    """Causal self-attention. `scale` is 1 / sqrt(C), over (layer + 1) with inverse-layer scaling, whichever implementation computes it."""

    def __init__(self, config: BackpackConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = (config.n_embd // config.n_head) ** -0.5 / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_NTD: Tensor, seen_NTS: Tensor, cache: Any) -> Tensor:
        q_NHTC, k_NHSC, v_NHSC = (p.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for p in self.c_attn(x_NTD).chunk(3, -1))
        if cache is not None:
            k_NHSC, v_NHSC = cache.update(k_NHSC, v_NHSC, self.layer)
        dropout = self.config.attn_pdrop if self.training else 0.0
        if self.config._attn_implementation == "eager":
            weights_NHTS = _normalised(q_NHTC @ k_NHSC.transpose(-1, -2) * self.scale, seen_NTS)
            read_NHTC = nn.functional.dropout(weights_NHTS, dropout) @ v_NHSC
        else:
            read_NHTC = nn.functional.scaled_dot_product_attention(
                q_NHTC, k_NHSC, v_NHSC, attn_mask=seen_NTS.unsqueeze(1), dropout_p=dropout, scale=self.scale
            )
        out: Tensor = self.resid_dropout(self.c_proj(read_NHTC.transpose(1, 2).flatten(2)))
        return out


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: BackpackConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, config.n_inner or 4 * config.n_embd, config.n_embd)
        # kept at the projections, for transformers passes over modules without parameters of their own, such as this one
        self.attn.c_proj.initial_share = self.mlp.c_proj.initial_share = (2 * config.n_layer) ** -0.5

    def forward(self, x_NTD: Tensor, seen_NTS: Tensor, cache: Any) -> Tensor:
        x_NTD = x_NTD + self.attn(self.ln_1(x_NTD), seen_NTS, cache)
        out: Tensor = x_NTD + self.mlp(self.ln_2(x_NTD))
        return out


class Trunk(nn.Module):
    """GPT-2 with learned positions and a final norm: h (N, T, D)."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, ids_NT: Tensor, positions_NT: Tensor, seen_NTS: Tensor, cache: Any) -> Tensor:
        x_NTD = self.drop(self.wte(ids_NT) + self.wpe(positions_NT))
        for block in self.h:
            x_NTD = block(x_NTD, seen_NTS, cache)
        out: Tensor = self.ln_f(x_NTD)
        return out


class SenseBlock(nn.Module):
    """r <- r + x, r <- r + MLP(LN_1(r)), LN_2(r). The first residual is the published model's; its authors call it an accident."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, 4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        residual = residual + x
        out: Tensor = self.ln_2(residual + self.mlp(self.ln_1(residual)))
        return out


class SenseNetwork(nn.Module):
    """C: (..., D) embeddings -> (..., K, D) sense vectors, token by token: MLP_2(SenseBlock(LN_0(e), e))."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.block = SenseBlock(config)
        self.final_mlp = MLP(config, config.sense_intermediate_scale * config.n_embd, config.num_senses * config.n_embd)

    def forward(self, embeddings: Tensor) -> Tensor:
        embeddings = self.dropout(embeddings)
        senses: Tensor = self.final_mlp(self.block(self.ln(embeddings), embeddings))
        return senses.view(*senses.shape[:-1], self.num_senses, -1)


class SenseWeightNetwork(nn.Module):
    """h (N, T, D) -> queries and keys (N, K, T, D / K) of the contextualisation."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        self.c_attn = nn.Linear(config.n_embd, 2 * config.n_embd)

    def forward(self, h_NTD: Tensor) -> tuple[Tensor, Tensor]:
        q_NTKC, k_NTKC = self.c_attn(h_NTD).unflatten(-1, (2, self.num_senses, -1)).unbind(-3)
        return q_NTKC.transpose(1, 2), k_NTKC.transpose(1, 2)


class Overrides(nn.Module):
    """A table of tokens whose sense vectors are not the network's: C'(ids[r])_k = keep[r, k] * C(ids[r])_k + senses[r, k].

    With keep 0 the vectors are put in the network's place, with keep 1 they are shifts, in between a sense is turned down. An empty table
    costs nothing and is not saved; another is part of the checkpoint, with its length in the config. The buffers can be given to
    `torch.func.functional_call` like any weight: `backpack.overrides.senses`.
    """

    ids: Tensor
    keep: Tensor
    senses: Tensor

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        R, K = config.num_overrides, config.num_senses
        self.put(torch.full((R,), -1), torch.zeros(R, K, config.n_embd), torch.ones(R, K))  # -1 is no token: filled by the checkpoint

    def put(self, ids_R: Tensor, senses_RKD: Tensor, keep_RK: Tensor) -> None:
        """These tensors are the table from now on; nothing is checked or copied. `BackpackLMHeadModel.override` does both."""
        for name, tensor in (("ids", ids_R), ("senses", senses_RKD), ("keep", keep_RK)):
            self.register_buffer(name, tensor, persistent=len(ids_R) > 0)

    def forward(self, ids: Tensor, senses: Tensor) -> Tensor:
        """`ids` (...), `senses` (..., K, D) of those ids -> the same with the table's."""
        if self.ids.shape[0] == 0:
            return senses
        sorted_R, order_R = self.ids.sort()
        found = torch.searchsorted(sorted_R, ids.contiguous()).clamp(max=len(sorted_R) - 1)
        listed, row = (sorted_R[found] == ids)[..., None, None], order_R[found]
        put = nn.functional.embedding(row, self.senses.flatten(1)).view_as(senses)  # its backward is much faster than that of indexing
        keep = nn.functional.embedding(row, self.keep).unsqueeze(-1)
        return torch.where(listed, (keep * senses + put).to(senses.dtype), senses)


class CheckpointError(ValueError):
    """A checkpoint that is not one of this model; the message names a tensor."""


def _check_read(read: dict[str, Any], other_shapes: bool) -> None:
    if missing := sorted(read["missing_keys"]):
        raise CheckpointError(f"The checkpoint lacks '{missing[0]}'{_more(missing)}, which a Backpack of its config has.")
    if extra := sorted(read["unexpected_keys"]):
        raise CheckpointError(f"The checkpoint holds '{extra[0]}'{_more(extra)}, which a Backpack of its config does not have.")
    if not other_shapes and (wrong := sorted(read["mismatched_keys"])):
        name, stored, wanted = wrong[0]
        raise CheckpointError(
            f"The checkpoint holds '{name}' as {tuple(stored)}{_more(wrong)}, a Backpack of its config as {tuple(wanted)}."
        )


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


class BackpackPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Initialisation as GPT-2's: normal, with the trunk's residual projections smaller by sqrt(2 * blocks)."""

    config: BackpackConfig
    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # second names of E and of the positions, and the causal masks that older versions of transformers kept as buffers
    _keys_to_ignore_on_load_unexpected = [r"\.(word|position)_embeddings\.weight$", r"\.attn\.(masked_)?bias$"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As ever, but a checkpoint that does not fit the config, tensor by tensor, raises CheckpointError: others would go on with random
        numbers, or without the tensors that they do not know."""
        given = {"output_loading_info": False, "ignore_mismatched_sizes": False} | kwargs
        model, read = super().from_pretrained(*args, **given | {"output_loading_info": True, "ignore_mismatched_sizes": True})
        _check_read(read, given["ignore_mismatched_sizes"])
        return (model, read) if given["output_loading_info"] else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As ever; the config that is saved says how long the table of overrides is, so that `from_pretrained` has room for it."""
        before = self.config.num_overrides
        self.config.num_overrides = sum(len(part.ids) for part in self.modules() if isinstance(part, Overrides))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config.num_overrides = before

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Conv1D):
            init.normal_(module.weight, mean=0.0, std=std * getattr(module, "initial_share", 1.0))
            init.zeros_(module.bias)


class BackpackModel(BackpackPreTrainedModel):
    """The Backpack without its head: `last_hidden_state` is o (N, T, D), and the logits are E o."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__(config)
        self.gpt2_model = Trunk(config)
        self.sense_network = SenseNetwork(config)
        self.sense_weight_net = SenseWeightNetwork(config)
        self.overrides = Overrides(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt2_model.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.gpt2_model.wte = value

    def senses(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids {self.config.num_senses} {self.config.n_embd}"]:
        """(..., K, D) sense vectors C of token ids, those of the table of overrides where a token is in it."""
        senses: Tensor = self.overrides(ids, self.sense_network(self.gpt2_model.wte(ids)))
        return senses

    def alpha(
        self,
        input_ids: Int[Tensor, "N T"],
        attention_mask: Int[Tensor, "N T"] | Bool[Tensor, "N T"] | None = None,
        position_ids: Int[Tensor, "#N T"] | None = None,
    ) -> Float[Tensor, "N {self.config.num_senses} T T"]:
        """(N, K, T, T) contextualisation: how much sense k of token j counts at position i, [n, k, i, j].

        Not negative, each row sums to 1, exactly 0 for j > i and for padding. (A row that is padding itself sees only itself.)
        """
        q_NKTC, k_NKSC, seen_NTS = self._contextualise(input_ids, attention_mask, position_ids, None)
        return self._alpha(q_NKTC, k_NKSC, seen_NTS)

    def _alpha(self, q_NKTC: Tensor, k_NKSC: Tensor, seen_NTS: Tensor) -> Tensor:
        return _normalised(q_NKTC @ k_NKSC.transpose(-1, -2) * q_NKTC.shape[-1] ** -0.5, seen_NTS)

    def _contextualise(self, ids_NT: Tensor, mask_NS: Tensor | None, positions_NT: Tensor | None, cache: Any) -> tuple[Tensor, ...]:
        """Queries (N, K, T, C) and keys of these tokens, and which tokens each of them may see (N or 1, T, S)."""
        past, T = 0 if cache is None else int(cache.get_seq_length()), ids_NT.shape[1]
        if mask_NS is not None and mask_NS.shape != (len(ids_NT), past + T):
            raise ValueError(
                f"attention_mask must be (texts, tokens) over the {past} cached and the {T} new tokens, {(len(ids_NT), past + T)}; "
                f"it is {tuple(mask_NS.shape)}. Static caches, which make masks of their own, are not supported."
            )
        i_T1, j_S = torch.arange(past, past + T, device=ids_NT.device)[:, None], torch.arange(past + T, device=ids_NT.device)
        seen_NTS = (j_S <= i_T1)[None]
        if mask_NS is not None:
            seen_NTS = (seen_NTS & mask_NS.bool()[:, None]) | (j_S == i_T1)  # padding sees itself: a row without any token would be NaN
        if positions_NT is None:  # counted from the first real token, so that padding on the left moves nothing
            counted = i_T1.T if mask_NS is None else (mask_NS.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            positions_NT = counted.expand_as(ids_NT)
        return (*self.sense_weight_net(self.gpt2_model(ids_NT, positions_NT, seen_NTS, cache)), seen_NTS)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        senses: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids` (N, T) new tokens, `attention_mask` (N, S) over cached and new ones, 1 for real tokens and 0 for padding.

        `senses` (N, T, K, D) are weighed in the place of C of these tokens; the contextualisation is the same.
        """
        for unknown in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if kwargs.get(unknown) is not None and kwargs[unknown] is not False:
                raise ValueError(f"A Backpack does not take '{unknown}'; `alpha` and `senses` give its inner quantities.")
        if use_cache if use_cache is not None else self.config.use_cache and not self.training:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
        if past_key_values is not None:
            self._make_room(past_key_values)
        q_NKTC, k_NKSC, seen_NTS = self._contextualise(input_ids, attention_mask, position_ids, past_key_values)
        senses_NSKD = self.senses(input_ids) if senses is None else senses
        if past_key_values is not None:  # (N, 1, S, K D): a cache grows along the second dimension from the end
            k_NKSC, flat = past_key_values.update(k_NKSC, senses_NSKD.flatten(2).unsqueeze(1), self.config.n_layer)
            senses_NSKD = flat.squeeze(1).unflatten(-1, senses_NSKD.shape[2:])
        alpha_NKTS = self._alpha(q_NKTC, k_NKSC, seen_NTS)
        out_NTD = alpha_NKTS.permute(0, 2, 3, 1).flatten(2) @ senses_NSKD.flatten(1, 2)  # one product over j and k together
        return BaseModelOutputWithPast(last_hidden_state=out_NTD, past_key_values=past_key_values)

    def _make_room(self, cache: Any) -> None:
        """A new cache made from the config has one layer for each block; the contextualisation needs one more of the same kind."""
        if len(cache.layers) == self.config.n_layer and not cache.layers[-1].is_initialized:
            cache.layers.append(copy.deepcopy(cache.layers[-1]))


class BackpackLMHeadModel(BackpackPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The Backpack language model."""

    _tied_weights_keys = {"lm_head.weight": "backpack.gpt2_model.wte.weight"}

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers finds it by the name of the class, where that ends so
        self.backpack = BackpackModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_published_names)
        self.post_init()

    def senses(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids {self.config.num_senses} {self.config.n_embd}"]:
        """(..., K, D) sense vectors C of token ids; (V, K, D) for a list of V ids. Overridden ones where the table has the token."""
        return self.backpack.senses(ids)

    def alpha(
        self,
        input_ids: Int[Tensor, "N T"],
        attention_mask: Int[Tensor, "N T"] | Bool[Tensor, "N T"] | None = None,
        position_ids: Int[Tensor, "#N T"] | None = None,
    ) -> Float[Tensor, "N {self.config.num_senses} T T"]:
        """(N, K, T, T) contextualisation: how much sense k of token j counts at position i, [n, k, i, j]. See `BackpackModel.alpha`."""
        return self.backpack.alpha(input_ids, attention_mask, position_ids)

    @torch.no_grad()
    def override(self, ids_R: Int[Tensor, "R"], senses_RKD: Float[Tensor, "R K D"], keep: Float[Tensor, "R K"] | float = 0.0) -> None:
        """From now on sense k of token ids[r] is keep[r, k] * C_k + senses[r, k], in the place of what was overridden before.

        keep 0 (the default) substitutes the vectors, keep 1 adds them, and no ids at all take every override away. Raises ValueError.
        """
        V, wanted = self.config.vocab_size, (len(ids_R), self.config.num_senses, self.config.n_embd)
        keep_RK = keep if isinstance(keep, Tensor) else torch.full(wanted[:2], float(keep))
        if senses_RKD.shape != wanted or keep_RK.shape != wanted[:2]:
            raise ValueError(
                f"The table for {len(ids_R)} tokens is {wanted} sense vectors and {wanted[:2]} numbers to keep, "
                f"got {tuple(senses_RKD.shape)} and {tuple(keep_RK.shape)}."
            )
        if len(ids_R) and not (0 <= int(ids_R.min()) and int(ids_R.max()) < V):
            raise ValueError(f"Token ids go from 0 to {V - 1}, got {int(ids_R.min())} to {int(ids_R.max())}.")
        if len(set(ids_R.tolist())) < len(ids_R):
            raise ValueError("A token can be overridden once, its id is there twice.")
        like = self.lm_head.weight
        self.backpack.overrides.put(
            ids_R.to(like.device, torch.long, copy=True), senses_RKD.detach().to(like, copy=True), keep_RK.detach().to(like, copy=True)
        )

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `BackpackModel.forward`. `labels` (N, T) are shifted here: those at t are predicted from before t; -100 does not count.

        `logits_to_keep`: only the last so many positions, or those listed, get logits (N, T, V).
        """
        read = self.backpack(input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_NTV = self.lm_head(read.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_NTV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_NTV, past_key_values=read.past_key_values)


def _published_names(
    model: BackpackLMHeadModel, state: dict[str, Any], prefix: str, _meta: Any, _strict: Any, _missing: Any, _extra: Any, errors: list[str]
) -> None:
    """Before `load_state_dict`: the published names that are second names of one tensor become the one, and kept causal masks go."""
    word, place = "backpack.gpt2_model.wte.weight", "backpack.gpt2_model.wpe.weight"
    second = {"backpack.word_embeddings.weight": word, "backpack.position_embeddings.weight": place}
    if model.config.tie_word_embeddings:
        second["lm_head.weight"] = word
    for name, first in ((prefix + a, prefix + b) for a, b in second.items()):
        if name in state and first in state and not torch.equal(state[name], state[first]):
            errors.append(f"'{name}' and '{first}' are one tensor in this model, the checkpoint has two different ones.")
        if name in state:
            state.setdefault(first, state.pop(name))
    if model.config.tie_word_embeddings and prefix + word in state:
        state[prefix + "lm_head.weight"] = state[prefix + word]
    for name in [n for n in state if n.endswith((".attn.bias", ".attn.masked_bias"))]:
        del state[name]


AutoConfig.register("backpack", BackpackConfig)
AutoModel.register(BackpackConfig, BackpackModel)
AutoModelForCausalLM.register(BackpackConfig, BackpackLMHeadModel)
