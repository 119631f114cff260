"""The one decoder: built from an `Arch`, computing on bound ops."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arch import GatedDelta, MoE
from .arithmetic import arithmetic
from .embedding import lookup
from .feedforward import Routing, make_feedforward
from .initialise import initialise
from .layers import Maker, Packing
from .mixers import make_mixer, mixer_name
from .rope import length_limit, rope_table
from .segments import tree_of

if TYPE_CHECKING:
    from ..backend import Backend
    from ..ops.common import Common
    from .arch import Arch, Layer, Rope


class DecoderLayer(nn.Module):
    """Norm, mixer, norm, feed-forward; the residual stream travels beside the last branch's output."""

    def __init__(self, layer: Layer, make: Maker):
        super().__init__()
        hidden = make.arch.hidden_size
        self.mixer = mixer_name(layer)
        self.attn_norm = make.norm(hidden)
        self.add_module(self.mixer, make_mixer(layer, make))
        self.mlp_norm = make.norm(hidden)
        self.mlp = make_feedforward(layer, make)

    def forward(
        self, x_TC: Tensor, residual_TC: Tensor | None, cos_TR: Tensor | None, sin_TR: Tensor | None,
        packing: Packing, routing: Routing | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h_TC, residual_TC = self.attn_norm.add(x_TC, residual_TC)
        x_TC = self.get_submodule(self.mixer)(h_TC, cos_TR, sin_TR, packing)
        h_TC, residual_TC = self.mlp_norm.add(x_TC, residual_TC)
        return (self.mlp(h_TC) if routing is None else self.mlp(h_TC, routing)), residual_TC


class Decoder(nn.Module):
    """A causal language model without its cache: packed tokens in, hidden states out.

    Parameters carry the neutral names of `WeightMap` and start uninitialised: load a checkpoint into them
    or call `init_weights`. The routers' selection biases are buffers, which no gradient changes. `backend`
    gives every op; the decoder itself only multiplies by weights. `router_dtype` is that of the routers'
    logits, float32 or float64. `consistent` keeps what lies between batch-invariant ops batch-invariant.
    """

    def __init__(
        self, arch: Arch, backend: Backend, *, device: torch.device | str, dtype: torch.dtype,
        router_dtype: torch.dtype = torch.float32, consistent: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        make = Maker(
            arch=arch, backend=backend, device=torch.device(device), dtype=dtype, router_dtype=router_dtype,
            arithmetic=arithmetic(backend, consistent=consistent),
        )  # fmt: skip
        self.arch, self.backend = arch, backend
        self.ropes: list[Rope] = []
        """Distinct rotary settings; most models have one."""
        self.rope_of_layer = [self._place(layer) for layer in arch.layers]
        self.embed = make.weight(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(layer, make) for layer in arch.layers)
        self.norm = make.norm(arch.hidden_size)
        if not arch.tie_word_embeddings:
            self.lm_head = make.weight(arch.vocab_size, arch.hidden_size)

    def head_weight(self) -> Tensor:
        """The output projection [V, C]: its own parameter, or the embedding's where the two are tied."""
        return self.embed.weight if self.arch.tie_word_embeddings else self.lm_head.weight

    def head_main_grad(self) -> Tensor | None:
        """float32 [V, C] where a trainer takes the output projection's gradient, or None."""
        return self.embed.main_grad if self.arch.tie_word_embeddings else self.lm_head.main_grad

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None,
        max_seqlen: int, recompute: bool, routed_experts_TMk: Tensor | None = None,
        record_TMk: Tensor | None = None, free_TMk: Tensor | None = None, common: Common | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [T, C] after the final norm, in the parameters' dtype.

        tokens_T and positions_T are int64 [T]; cu_seqlens int32 [S + 1]; parents int32 [S] or None for
        segments that stand alone; max_seqlen the longest segment, its parent not counted. `recompute`
        keeps only each layer's inputs and computes the rest again in the backward pass, bit for bit. `common`
        holds the lengths of this pass on the host.

        routed_experts_TMk (int16; M layers with experts in order, k experts of a token) fixes the choice of
        experts; rows of -1 are routed freely. The experts used are written to record_TMk (int16), those that
        each layer's router would choose for what reaches it to free_TMk (int16).
        """
        recompute = recompute and torch.is_grad_enabled()
        tables = [self._table(rope, positions_T, max_seqlen) for rope in self.ropes]
        packing = Packing(cu_seqlens=cu_seqlens, parents=parents, max_seqlen=max_seqlen, common=common)
        if parents is not None and any(isinstance(layer.mixer, GatedDelta) for layer in self.arch.layers):
            packing = replace(packing, tree=tree_of(cu_seqlens, parents, common))
        routings = self._routings(tokens_T, routed_experts_TMk, record_TMk, free_TMk, recompute)
        x_TC, residual_TC = lookup(self.embed.weight, tokens_T, self.embed.main_grad), None
        for layer, rope, routing in zip(self.layers, self.rope_of_layer, routings, strict=True):
            table = (None, None) if rope is None else tables[rope]
            inputs = (x_TC, residual_TC, *table, packing, routing)
            if recompute:
                x_TC, residual_TC = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TC, residual_TC = layer(*inputs)
        return self.norm.add(x_TC, residual_TC)[0]

    def init_weights(self, seed: int) -> None:
        """Fill the parameters as a fresh model: normal matrices, norms that do nothing, zero biases.

        The draw depends on the seed and the arch only, not on device or dtype.
        """
        initialise(self, seed, self.arch.initializer_range)

    def _place(self, layer: Layer) -> int | None:
        """Which rotary table a layer reads."""
        if isinstance(layer.mixer, GatedDelta):
            return None
        if layer.mixer.rope not in self.ropes:
            self.ropes.append(layer.mixer.rope)
        return self.ropes.index(layer.mixer.rope)

    def _table(self, rope: Rope, positions_T: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        # A segment goes on where its parent ends, so only positions know the true length; reading them
        # costs a synchronisation, paid by the two scalings that have a limit.
        limited = length_limit(rope) is not None and positions_T.numel() > 0
        return rope_table(rope, positions_T, max_length=int(positions_T.max()) + 1 if limited else max_seqlen)

    def _routings(
        self, tokens_T: Tensor, fixed_TMk: Tensor | None, record_TMk: Tensor | None,
        free_TMk: Tensor | None, recompute: bool,
    ) -> list[Routing | None]:  # fmt: skip
        """What each layer is told of its routing; None for layers without experts."""
        sizes = [layer.ffn.top_k if isinstance(layer.ffn, MoE) else None for layer in self.arch.layers]
        chosen = [size for size in sizes if size is not None]
        if chosen and recompute:
            # The second pass reads what the first one wrote: a near tie that falls the other way when it is
            # computed again would change the shapes of what autograd has saved.
            if record_TMk is None:
                shape = (tokens_T.shape[0], len(chosen), chosen[0])
                record_TMk = torch.empty(shape, dtype=torch.int16, device=tokens_T.device)
            record_TMk.copy_(fixed_TMk) if fixed_TMk is not None else record_TMk.fill_(-1)
            fixed_TMk = record_TMk
        places = iter(range(len(chosen)))
        found: list[Routing | None] = []
        for size in sizes:
            place = None if size is None else next(places)
            found.append(
                None
                if place is None
                else Routing(
                    ids_Tk=None if fixed_TMk is None else fixed_TMk[:, place],
                    record_Tk=None if record_TMk is None else record_TMk[:, place],
                    free_Tk=None if free_TMk is None else free_TMk[:, place],
                )
            )
        return found
