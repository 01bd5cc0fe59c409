"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer that looks a token further ahead.

    x_i^k = W_k [enorm(Emb(t_{i+k})) ; hnorm(h_i^{k-1})]          h^0: the decoder's hidden states, after its final norm
    h_i^k = norm_k(layer_k(x_1^k .. x_i^k))                       logits of t_{i+k+1}: head(h_i^k)

for the module of depth k = 1, 2, ...; embedding and head are the decoder's own. A checkpoint keeps the module of depth k as
layer num_hidden_layers + k - 1, with W_k as ``eh_proj`` and norm_k as ``shared_head.norm``; its ``embed_tokens`` and
``shared_head.head`` are copies. Positions count the hidden states, so the rotary embedding turns x_i as it turns token i.

What the paper leaves open, or says otherwise than the published weights need it:

- Order: the paper writes [h ; Emb]; the weights of ``eh_proj`` want the embedding first (Megatron-LM's issue 1588; so do vLLM,
  SGLang and transformers' ``MtpLayer``).
- h is normalised twice, by the norm that ends the model or the module before and by ``hnorm``: so do Megatron-LM, SGLang's
  ``deepseek_nextn.py`` and transformers at every depth. vLLM's ``deepseek_mtp.py`` left the norm between modules out at
  first; with it more drafts of DeepSeek-R1 are accepted (ROCm/ATOM 1764). DeepSeek has not said (issue 839 of DeepSeek-V3),
  and one trial found slightly more accepted without the model's own norm (vLLM 12915, not merged).
- The embedding at position 0 is used like any other. vLLM writes zeros there, though with ids shifted by one it is a real
  token's (its issue 33299); SGLang, transformers and the paper do not.
- Names, copies and numbering: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.cache.layer import LayerCache
from memjax.models.config import ModelConfig
from memjax.models.norm import RMSNorm


class MtpModule(nnx.Module):
    """One depth of multi-token prediction, without the embedding and the head, which are the decoder's.

    Attributes:
      enorm, hnorm: of the embeddings and of the hidden states, [D] each.
      eh_proj: [2 D, D], the embedding's rows first.
      layer: a decoder layer; its cache is one more layer's.
      norm: of what the layer gives, [D].
    """

    def __init__(self, config: ModelConfig, layer: nnx.Module, dtype: DTypeLike, rngs: nnx.Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(config.width, config.norm_eps, dtype, unit_offset=config.unit_offset)

        self.enorm, self.hnorm, self.norm = norm(), norm(), norm()
        self.eh_proj = nnx.Linear(2 * config.width, config.width, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layer = layer

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        hidden: Float[Array, "B T D"],
        cache: LayerCache | None,
        lengths: Int[Array, "B"] | None,
        compress_first: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Hidden states after the module's norm, in the dtype of ``hidden``, and the cache, its newest tokens maybe staged.

        Args:
          embedded: of the tokens that stand as many places behind those of ``hidden`` as the module is deep.
          hidden, cache, lengths, compress_first: as for ``Decoder.predict_ahead``.
        """
        x = self.eh_proj(jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1))
        x, cache = self.layer(x, cache, lengths, compress_first)
        return self.norm(x), cache
