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


T5_WORDS = ("<pad>", "</s>", "<unk>", "▁", "▁cat", "▁dog", "▁a", "a", "o", "n", "g")
SD3_TRANSFORMER = {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 40,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}


def t5_tokenizer(folder, length: int = 40):
    """Return a tokenizer of T5 for eleven pieces of words."""
    pieces = [(word, 0.0 if word[0] == "<" else -3.0) for word in T5_WORDS]
    made = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
    made.save_pretrained(folder)
    return transformers.T5Tokenizer.from_pretrained(folder)


def t5_encoder(**changes: object) -> torch.nn.Module:
    options = {
        "vocab_size": 16, "d_model": 40, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    return transformers.T5EncoderModel(transformers.T5Config(**options | changes)).eval()


def stable_diffusion_3(tmp_path, with_t5: bool = True):
    """Return diffusers' pipeline for Stable Diffusion 3, with random weights."""
    torch.manual_seed(2)
    vae = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    unquantised = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.StableDiffusion3Pipeline(
        vae=diffusers.AutoencoderKL(**VAE | vae | unquantised),
        text_encoder=encoder("CLIPTextModelWithProjection"),
        text_encoder_2=encoder("CLIPTextModelWithProjection", hidden_size=12, hidden_act="gelu"),
        text_encoder_3=t5_encoder() if with_t5 else None,
        tokenizer=tokenizer(tmp_path / "tokenizer"),
        tokenizer_2=tokenizer(tmp_path / "tokenizer_2", pad_token="!"),
        tokenizer_3=t5_tokenizer(tmp_path / "tokenizer_3") if with_t5 else None,
        transformer=diffusers.SD3Transformer2DModel(**SD3_TRANSFORMER),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
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
