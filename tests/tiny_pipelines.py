"""Pipelines of diffusers with random weights, small enough for tests to build."""

import diffusers
import tiny_text
import torch
import transformers

from minidiff import DDIMScheduler, Pipeline, UNet
from minidiff.nn import SpaceToDepth

diffusers.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": 2 * ("DownEncoderBlock2D",),
    "up_block_types": 2 * ("UpDecoderBlock2D",),
    "norm_num_groups": 4,
    "sample_size": 32,
}
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "sample_size": 16,
}
# The scheduler of each generation and its prediction type, from the published folders.
SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = ("PNDMScheduler", {**SD_SCHEDULE, "skip_prk_steps": True, "steps_offset": 1})
DDIM_V = (
    "DDIMScheduler",
    {
        **SD_SCHEDULE,
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
)
DDIM = ("DDIMScheduler", {**DDIM_V[1], "prediction_type": "epsilon"})
EULER = {**SD_SCHEDULE, "steps_offset": 1, "timestep_spacing": "leading"}


def encoder(cls: str, **changes: object) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(**tiny_text.tiny_text_config(**changes))
    return getattr(transformers, cls)(config).eval()


def tokenizer(folder, **options):
    tiny_text.write_tokenizer(folder, **options)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def stable_diffusion(tmp_path, scheduler=PNDM, text=None, unet=None):
    """Return diffusers' pipeline for generation 1 or 2, with random weights."""
    torch.manual_seed(0)
    name, options = scheduler
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=encoder("CLIPTextModel", **(text or {})),
        tokenizer=tokenizer(tmp_path / "tokenizer"),
        unet=diffusers.UNet2DConditionModel(**UNET | (unet or {})),
        scheduler=getattr(diffusers, name)(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(tmp_path, **options):
    """Return diffusers' pipeline for SDXL, with random weights."""
    torch.manual_seed(1)
    second = {"hidden_size": 12, "hidden_act": "gelu"}
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 10 + 6 * 6,
        "cross_attention_dim": 16 + 12,
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**VAE | {"scaling_factor": 0.13025}),
        text_encoder=encoder("CLIPTextModel"),
        text_encoder_2=encoder("CLIPTextModelWithProjection", **second),
        tokenizer=tokenizer(tmp_path / "tokenizer"),
        tokenizer_2=tokenizer(tmp_path / "tokenizer_2", pad_token="!"),
        unet=diffusers.UNet2DConditionModel(**UNET | added),
        scheduler=diffusers.EulerDiscreteScheduler(**EULER),
        **options,
    )


def digits() -> Pipeline:
    """Return a pipeline of minidiff with random weights: ten classes, blocks of pixels."""
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, num_class_embeds=11,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", compat="exact")
    return Pipeline(unet, scheduler, SpaceToDepth(2), list("0123456789"), guidance_scale=2.0)
