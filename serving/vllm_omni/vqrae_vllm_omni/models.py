"""The first stage: vLLM's Qwen3, whose next token is a code that two rows share.

The engine's own sampler sees one request at a time, so the code is drawn before it, where all rows
of a step are there; the sampler then has one choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm_omni.model_executor.models.output_templates import OmniOutput

from vqrae.generation.modeling import VisualVocabulary
from vqrae_vllm_omni.guidance import next_ids


class VQRAEGenerator(Qwen3ForCausalLM):
    """A generator of one code a position, on one device.

    Raises:
        ValueError: for tensor or pipeline parallelism, which split the rows of the codes.
    """

    have_multimodal_outputs = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if vllm_config.parallel_config.world_size != 1:
            raise ValueError(
                f"got {vllm_config.parallel_config.world_size} devices for the language model, "
                "expected 1: serve replicas instead"
            )
        config = vllm_config.model_config.hf_config
        self.vocabulary = VisualVocabulary(**config.visual_vocabulary)
        self.num_ids: int = config.vocab_size
        self.next_ids_R: Tensor | None = None

    def make_omni_output(
        self,
        model_outputs: Tensor,
        *,
        model_intermediate_buffer: Sequence[dict[str, Any]] | None = None,
        request_token_spans: Sequence[tuple[int, int]] | None = None,
        **_: Any,
    ) -> OmniOutput:
        """Draw the next code of every image from final states (tokens, D); called in each step.

        Args:
            model_intermediate_buffer: of each request; none while vLLM measures its memory.
            request_token_spans: first and end of each request's rows.
        """
        self.next_ids_R = None
        if model_intermediate_buffer and request_token_spans:
            last = [end - 1 for _, end in request_token_spans]
            weight_KD = self.lm_head.weight[self.vocabulary.code_rows]
            logits_RK = F.linear(model_outputs[last], weight_KD)
            self.next_ids_R = next_ids(logits_RK, model_intermediate_buffer, self.vocabulary)
        return OmniOutput(text_hidden_states=model_outputs, multimodal_outputs={})

    def compute_logits(self, hidden_states: Tensor, sampling_metadata: Any = None) -> Tensor:
        """Logits (R, V) that leave only the codes drawn in this step."""
        ids_R = self.next_ids_R
        if ids_R is None:
            ids_R = torch.zeros(len(hidden_states), dtype=torch.int64, device=hidden_states.device)
        logits_RV = hidden_states.new_full((len(hidden_states), self.num_ids), -torch.inf)
        return logits_RV.scatter_(1, ids_R[:, None], 0)
