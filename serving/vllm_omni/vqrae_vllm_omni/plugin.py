"""What vLLM-Omni calls at its start: it learns our two stages, and which folders they serve."""

from typing import Any

from transformers import PreTrainedConfig

from vqrae.generation.modeling import VisualVocabulary
from vqrae_vllm_omni import prompts

GENERATOR, PIXELS = "VQRAEGenerator", "VQRAEPixels"
SCHEDULER = "vllm_omni.core.sched.omni_cfg_ar_scheduler.OmniCFGARScheduler"


def register() -> None:
    """Make the stages known; called once or more in every process."""
    from vllm_omni.config.pipeline_registry import OMNI_PIPELINES, register_pipeline
    from vllm_omni.diffusion.registry import register_diffusion_model
    from vllm_omni.model_executor.models.registry import OmniModelRegistry

    if OMNI_PIPELINES.get("qwen3") is pipeline:
        return
    OmniModelRegistry.register_model(GENERATOR, "vqrae_vllm_omni.models:VQRAEGenerator")
    stage = (PIXELS, "vqrae_vllm_omni.pixels", "PixelStage")
    register_diffusion_model(*stage, post_process_func_name="post_process")
    register_pipeline(pipeline, model_type="qwen3")


def pipeline(config: PreTrainedConfig | None) -> Any:
    """The two stages of a generator; None for any other Qwen3.

    Raises:
        ValueError: for several codes at a position.
    """
    values = getattr(config, "visual_vocabulary", None)
    if config is None or values is None:
        return None
    vocabulary = VisualVocabulary(**values)
    if vocabulary.num_codebooks > 1:
        raise ValueError(
            f"got a generator of {vocabulary.num_codebooks} codes a position, expected 1: "
            "use `vqrae generate`"
        )
    from vllm_omni.config import stage_config as omni

    prompts.serve(config)
    hooks = prompts.__name__
    # Nothing but its number of codes ends an image.
    length = {"max_tokens": vocabulary.num_codes, "ignore_eos": True, "detokenize": False}
    language = omni.StagePipelineConfig(
        stage_id=0,
        model_stage="ar",
        model_arch=GENERATOR,
        execution_type=omni.StageExecutionType.LLM_AR,
        owns_tokenizer=True,
        engine_output_type="token_ids",
        scheduler_cls=SCHEDULER,
        prompt_transform_func=f"{hooks}.transform",
        prompt_expand_func=f"{hooks}.expand",
        sampling_constraints=length,
    )
    pixels = omni.StagePipelineConfig(
        stage_id=1,
        model_stage="dit",
        model_arch=PIXELS,
        execution_type=omni.StageExecutionType.DIFFUSION,
        input_sources=(0,),
        final_output=True,
        final_output_type="image",
        custom_process_input_func=f"{hooks}.to_pixels",
        omni_kv_config={"need_recv_cache": False},
    )
    return omni.PipelineConfig(model_type="qwen3", model_arch=GENERATOR, stages=(language, pixels))
