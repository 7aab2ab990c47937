"""Every kind of model that a ComfyUI builds, with its own classes at small sizes: a table of configs by class of supported_models.

Run inside a host's Python. ``MODELS`` says how each is built small, ``LEFT_OUT`` why another is not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.supported_models
import torch

Config = dict[str, Any]

UNET: Config = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1, "context_dim": 48,
    "use_spatial_transformer": True, "legacy": False, "num_heads": 4, "num_head_channels": -1, "use_linear_in_transformer": False,
    "adm_in_channels": None, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SHORT: Config = {
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1],
}  # fmt: skip
LINEAR: Config = UNET | {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 16}
XL: Config = LINEAR | {"adm_in_channels": 96, "num_classes": "sequential"}
VIDEO: Config = XL | {
    "in_channels": 8, "use_temporal_attention": True, "use_temporal_resblock": True, "video_kernel_size": [3, 1, 1],
    "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
}  # fmt: skip
FLUX: Config = {
    "image_model": "flux", "in_channels": 4, "out_channels": 4, "patch_size": 2, "vec_in_dim": 24, "context_in_dim": 40,
    "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "axes_dim": [2, 2, 4], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], "yak_mlp": False, "txt_norm": False,
}  # fmt: skip
CHROMA: Config = {k: v for k, v in FLUX.items() if k not in {"guidance_embed", "yak_mlp", "txt_norm"}} | {
    "image_model": "chroma", "in_channels": 16, "out_channels": 16, "in_dim": 64, "out_dim": 32, "hidden_dim": 24, "n_layers": 2,
    "vec_in_dim": None,
}  # fmt: skip
HUNYUAN: Config = {
    "image_model": "hunyuan_video", "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2], "vec_in_dim": 24, "context_in_dim": 40,
    "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [2, 2, 4], "theta": 256,
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
LUMINA: Config = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 4, "dim": 32, "cap_feat_dim": 40, "n_layers": 2, "qk_norm": True,
    "n_heads": 4, "n_kv_heads": 4, "axes_dims": [2, 2, 4], "axes_lens": [30, 32, 32], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
    "multiple_of": 16,
}  # fmt: skip
ZIMAGE: Config = LUMINA | {
    "dim": 256,
    "axes_dims": [16, 24, 24],
    "n_layers": 1,
    "n_refiner_layers": 1,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 8,
}
WAN: Config = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "patch_size": (1, 2, 2),
    "freq_dim": 32, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 4, "out_dim": 4,
    "text_dim": 40, "text_len": 8,
}  # fmt: skip
COSMOS: Config = {
    "image_model": "cosmos", "max_img_h": 24, "max_img_w": 24, "max_frames": 8, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 32, "block_config": "FA-CA-MLP", "num_blocks": 2, "num_heads": 2, "concat_padding_mask": True,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop", "block_x_format": "THWBD",
    "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 8, "crossattn_emb_channels": 40,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
PREDICT2: Config = {
    k: v for k, v in COSMOS.items() if k not in {"block_config", "block_x_format", "affline_emb_norm", "extra_per_block_abs_pos_emb_type"}
} | {"image_model": "cosmos_predict2", "extra_per_block_abs_pos_emb": False, "min_fps": 1, "max_fps": 30}  # fmt: skip
LTX: Config = {
    "image_model": "ltxv", "in_channels": 8, "cross_attention_dim": 32, "attention_head_dim": 8, "num_attention_heads": 4,
    "caption_channels": 40, "num_layers": 2,
}  # fmt: skip
COG: Config = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 24, "text_embed_dim": 40, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": 8,
}  # fmt: skip
KANDINSKY: Config = {
    "image_model": "kandinsky5", "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 40, "in_text_dim2": 24, "time_dim": 32,
    "model_dim": 32, "ff_dim": 48, "visual_embed_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 4, 4),
}  # fmt: skip
HUNYUAN3D: Config = {
    "image_model": "hunyuan3d2", "in_channels": 8, "context_in_dim": 40, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 4, "depth": 1,
    "depth_single_blocks": 1, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
OMNIGEN: Config = {
    "image_model": "omnigen2", "axes_dim_rope": (2, 2, 4), "axes_lens": (32, 32, 32), "hidden_size": 32, "in_channels": 4, "multiple_of": 16,
    "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 2, "num_refiner_layers": 1, "text_feat_dim": 40,
}  # fmt: skip
QWEN: Config = {
    "image_model": "qwen_image", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
    "joint_attention_dim": 40, "pooled_projection_dim": 24, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
AUDIO: Config = {
    "audio_model": "dit1.0", "io_channels": 8, "embed_dim": 128, "cond_token_dim": 40, "project_cond_tokens": True, "global_cond_dim": 24,
    "depth": 2, "num_heads": 2, "timestep_features_type": "learned",
}  # fmt: skip
CASCADE: Config = {"c_in": 4, "c_out": 4, "c_r": 16, "nhead": [4, 4], "c_hidden": [32, 32]}

MODELS: dict[str, Config] = {
    "SD15": UNET,
    "SD20": LINEAR | SHORT,
    "SD21UnclipL": XL | SHORT,
    "SD21UnclipH": XL | SHORT,
    "LotusD": LINEAR | SHORT | {"adm_in_channels": 4, "num_classes": "sequential"},
    "Stable_Zero123": UNET | SHORT | {"in_channels": 8},
    "SD15_instructpix2pix": UNET | SHORT | {"in_channels": 8},
    "SDXL": XL,
    "SDXLRefiner": XL | {"transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2]},
    "SDXL_instructpix2pix": XL | SHORT | {"in_channels": 8},
    "SSD1B": XL | SHORT | {"transformer_depth_middle": -1},
    "KOALA_700M": XL | SHORT,
    "KOALA_1B": XL | SHORT,
    "Segmind_Vega": XL | SHORT | {"transformer_depth_middle": -1},
    "SD_X4Upscaler": LINEAR | {"in_channels": 7, "num_classes": 1000, "disable_self_attentions": [True, False], "num_heads": 4, "num_head_channels": -1},
    "SVD_img2vid": VIDEO,
    "SV3D_u": VIDEO | SHORT,
    "SV3D_p": VIDEO | SHORT,
    "Stable_Cascade_C": CASCADE | {
        "stable_cascade_stage": "c", "patch_size": 1, "c_cond": 24, "blocks": [[1, 1], [1, 1]], "c_clip_text": 40, "c_clip_text_pooled": 40,
        "c_clip_img": 24, "c_clip_seq": 2,
    },
    "Stable_Cascade_B": CASCADE | {
        "stable_cascade_stage": "b", "patch_size": 2, "c_cond": 24, "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [1, 2]],
        "level_config": ["CT", "CTA"], "c_clip": 40, "c_clip_seq": 2, "c_effnet": 4, "dropout": [0.0, 0.0], "nhead": [-1, 4],
    },
    "SD3": {
        "in_channels": 4, "patch_size": 2, "out_channels": 4, "depth": 2, "input_size": None, "adm_in_channels": 24, "pos_embed_max_size": 8,
        "num_patches": 64, "pos_embed_scaling_factor": None, "qk_norm": "rms", "x_block_self_attn_layers": [0],
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}},
    },
    "AuraFlow": {"dim": 32, "n_layers": 3, "n_double_layers": 1, "n_heads": 4, "cond_seq_dim": 40, "max_seq": 64, "global_conddim": 32},
    "PixArtAlpha": {
        "image_model": "pixart_alpha", "num_heads": 4, "patch_size": 2, "hidden_size": 32, "in_channels": 4, "depth": 2, "input_size": 32,
        "pe_interpolation": 1, "micro_condition": True, "caption_channels": 40,
    },
    "PixArtSigma": {
        "image_model": "pixart_sigma", "num_heads": 4, "patch_size": 2, "hidden_size": 32, "in_channels": 4, "depth": 2, "input_size": 32,
        "pe_interpolation": 1, "micro_condition": False, "caption_channels": 40,
    },
    "HunyuanDiT": {
        "image_model": "hydit", "hidden_size": 32, "depth": 2, "num_heads": 4, "text_states_dim": 40, "text_states_dim_t5": 48, "text_len": 8,
        "text_len_t5": 8, "size_cond": False, "use_style_cond": False,
    },
    "HunyuanDiT1": {
        "image_model": "hydit1", "hidden_size": 32, "depth": 2, "num_heads": 4, "text_states_dim": 40, "text_states_dim_t5": 48, "text_len": 8,
        "text_len_t5": 8, "size_cond": True, "use_style_cond": True,
    },
    "Flux": FLUX,
    "FluxSchnell": FLUX | {"guidance_embed": False},
    "FluxInpaint": FLUX | {"in_channels": 24},
    "LongCatImage": FLUX | {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
    "Flux2": FLUX | {
        "image_model": "flux2", "axes_dim": [2, 2, 2, 2], "mlp_ratio": 3.0, "out_channels": 8, "in_channels": 8, "global_modulation": True,
        "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3], "patch_size": 1, "vec_in_dim": None,
    },
    "HiDreamO1": {
        "image_model": "hidream_o1", "text_config_overrides": {
            "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16,
        },
        "vision_config_overrides": {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "depth": 1, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "Chroma": CHROMA,
    "ChromaRadiance": CHROMA | {
        "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 4, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2,
        "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 0, "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32,
        "use_x0": False, "use_sequential_txt_ids": False,
    },
    "Lens": {
        "image_model": "lens", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "enc_hidden_dim": 40, "axes_dims_rope": (2, 2, 4), "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1),
    },
    "GenmoMochi": {
        "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 32, "hidden_size_y": 24, "mlp_ratio_x": 384.0,
        "mlp_ratio_y": 256.0, "learn_sigma": False, "in_channels": 4, "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0,
        "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True, "t5_feat_dim": 40, "t5_token_length": 8, "use_t5": True,
        "rope_theta": 10000.0,
    },
    "LTXV": LTX,
    "LTXAV": LTX | {
        "image_model": "ltxav", "audio_in_channels": 8, "audio_cross_attention_dim": 16, "audio_attention_head_dim": 8,
        "audio_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_attention_heads": 4, "connector_num_layers": 1,
        "audio_connector_num_attention_heads": 2,
    },
    "HunyuanVideo": HUNYUAN,
    "HunyuanVideoI2V": HUNYUAN | {"in_channels": 9},
    "HunyuanVideoSkyreelsI2V": HUNYUAN | {"in_channels": 8},
    "HunyuanVideo15": HUNYUAN | {"vision_in_dim": 24, "byt5": True, "use_cond_type_embedding": True, "vec_in_dim": None, "meanflow_sum": True},
    "HunyuanVideo15_SR_Distilled": HUNYUAN | {"vision_in_dim": 24, "byt5": True, "use_cond_type_embedding": True, "vec_in_dim": None, "meanflow": True, "meanflow_sum": True},
    "HunyuanImage21": HUNYUAN | {"patch_size": [1, 1], "vec_in_dim": None, "axes_dim": [4, 4], "byt5": True},
    "HunyuanImage21Refiner": HUNYUAN | {"patch_size": [1, 1, 1], "vec_in_dim": None},
    "CosmosT2V": COSMOS,
    "CosmosI2V": COSMOS | {"in_channels": 5},
    "CosmosT2IPredict2": PREDICT2,
    "CosmosI2VPredict2": PREDICT2 | {"in_channels": 5},
    "Anima": PREDICT2 | {"image_model": "anima", "crossattn_emb_channels": 1024},
    "ZImage": ZIMAGE,
    "Lumina2": LUMINA | {"n_kv_heads": 2},
    "ZImagePixelSpace": ZIMAGE | {
        "image_model": "zimage_pixel", "in_channels": 3, "decoder_in_channels": 12, "decoder_hidden_size": 16, "decoder_num_res_blocks": 1,
        "decoder_max_freqs": 2,
    },
    "PixelDiTT2I": {
        "image_model": "pixeldit_t2i", "hidden_size": 32, "num_groups": 4, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 16,
        "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1, "patch_size": 4, "txt_embed_dim": 40, "txt_max_length": 8,
    },
    "PiD": {
        "image_model": "pid", "hidden_size": 32, "num_groups": 4, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 16,
        "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1, "patch_size": 4, "txt_embed_dim": 40, "txt_max_length": 8,
        "lq_latent_channels": 4, "lq_hidden_dim": 32, "lq_num_res_blocks": 1,
    },
    "WAN21_T2V": WAN,
    "WAN22_T2V": WAN | {"out_dim": 8},
    "WAN21_CausalAR_T2V": WAN | {"causal_ar": True},
    "WAN21_I2V": WAN | {"model_type": "i2v", "in_dim": 9},
    "WAN21_FunControl2V": WAN | {"model_type": "i2v", "in_dim": 12, "in_dim_ref_conv": 4},
    "WAN21_Vace": WAN | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 24},
    "WAN21_Camera": WAN | {"model_type": "camera", "in_dim": 8, "in_dim_control_adapter": 4},
    "WAN22_Camera": WAN | {"model_type": "camera_2.2", "in_dim": 9, "in_dim_control_adapter": 4},
    "WAN22_S2V": WAN | {"model_type": "s2v", "audio_dim": 24, "num_audio_token": 2, "cond_dim": 4, "audio_inject_layers": [0]},
    "WAN21_HuMo": WAN | {"model_type": "humo"},
    "WAN22_Animate": WAN | {"model_type": "animate", "in_dim": 9},
    "WAN_Animate2": WAN | {"model_type": "animate2", "in_dim": 9},
    "WAN21_FlowRVS": WAN | {"model_type": "flow_rvs"},
    "WAN21_SCAIL": WAN | {"model_type": "scail"},
    "WAN21_SCAIL2": WAN | {"model_type": "scail2"},
    "WAN22_WanDancer": WAN | {"model_type": "wandancer", "in_dim": 9, "audio_inject_layers": [0], "music_dim": 16, "music_heads": 2, "music_latent_dim": 16},
    "Hunyuan3Dv2": HUNYUAN3D,
    "Hunyuan3Dv2mini": HUNYUAN3D,
    "Hunyuan3Dv2_1": {"image_model": "hunyuan3d2_1", "in_channels": 8, "hidden_size": 32, "context_dim": 40, "depth": 3, "num_heads": 4, "num_moe_layers": 1, "num_experts": 2, "guidance_cond_proj_dim": 24},
    "TripoSplat": {"image_model": "triposplat", "q_token_length": 16, "model_channels": 64, "cond_channels": 40, "num_blocks": 1, "num_refiner_blocks": 1, "num_head_channels": 32, "cond2_channels": 24, "in_channels": 4, "out_channels": 4},
    "HiDream": {
        "image_model": "hidream", "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [40, 48], "text_emb_dim": 24, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (16, 16), "llama_layers": [0, 0],
    },
    "SeedVR2": {
        "image_model": "seedvr2", "norm_eps": 1e-5, "num_layers": 2, "mlp_type": "normal", "vid_in_channels": 9, "vid_out_channels": 4,
        "vid_dim": 32, "txt_in_dim": 40, "heads": 2, "head_dim": 16, "mm_layers": 1, "expand_ratio": 2, "rope_dim": 12,
    },
    "ACEStep": {
        "audio_model": "ace", "attention_head_dim": 16, "in_channels": 4, "inner_dim": 32, "max_height": 16, "max_position": 64, "max_width": 64,
        "mlp_ratio": 2.5, "num_attention_heads": 2, "num_layers": 2, "out_channels": 4, "patch_size": [16, 1], "rope_theta": 1000000.0,
        "speaker_embedding_dim": 16, "text_embedding_dim": 40, "ssl_encoder_depths": [1, 1], "ssl_latent_dims": [16, 16],
        "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 32, "lyric_hidden_size": 32,
    },
    "ACEStep15": {
        "audio_model": "ace1.5", "in_channels": 24, "hidden_size": 32, "text_hidden_dim": 24, "timbre_hidden_dim": 8, "audio_acoustic_hidden_dim": 8,
        "num_dit_layers": 2, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 16, "intermediate_size": 48, "fsq_dim": 32, "encoder_hidden_size": 32, "encoder_intermediate_size": 48, "encoder_num_heads": 2,
    },
    "Omnigen2": OMNIGEN,
    "Boogu": {k: v for k, v in OMNIGEN.items() if k != "text_feat_dim"} | {"image_model": "boogu", "num_double_stream_layers": 1, "instruction_feat_dim": 40},
    "QwenImage": QWEN,
    "MageFlow": {k: v for k, v in QWEN.items() if k != "pooled_projection_dim"} | {"image_model": "mage_flow", "out_channels": 16},
    "JoyImage": {
        "image_model": "joyimage", "in_channels": 4, "hidden_size": 32, "patch_size": [1, 2, 2], "num_layers": 2, "num_attention_heads": 4,
        "text_dim": 40, "rope_dim_list": [2, 2, 4], "theta": 10000,
    },
    "Ideogram4": {
        "image_model": "ideogram4", "in_channels": 16, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "intermediate_size": 48,
        "adaln_dim": 16, "llm_features_dim": 40, "mrope_section": [2, 1, 1],
    },
    "Krea2": {
        "image_model": "krea2", "features": 64, "channels": 4, "patch": 2, "layers": 2, "heads": 4, "kvheads": 2, "txtlayers": 2, "txtdim": 40,
        "tdim": 32, "multiplier": 2, "txtheads": 4, "txtkvheads": 4,
    },
    "Kandinsky5": KANDINSKY,
    "Kandinsky5Image": KANDINSKY,
    "ErnieImage": {
        "image_model": "ernie", "hidden_size": 32, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 48, "in_channels": 8,
        "out_channels": 8, "text_in_dim": 40, "rope_axes_dim": (2, 2, 4),
    },
    "MiniMaxH3": {
        "image_model": "minimax_h3", "hidden_size": 32, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 4,
        "attention_head_dim": 8, "ffn_hidden_size": 48, "latents_dim": 4, "audio_latents_dim": 4, "text_dim": 40, "timestep_input_dim": 16,
        "time_embed_hidden_size": 32, "time_embed_dim": 24, "rope_inv_freq_len": 2,
    },
    "CogVideoX_T2V": COG,
    "CogVideoX_I2V": COG | {"in_channels": 8},
    "CogVideoX_Inpaint": COG | {"in_channels": 12},
    "StableAudio": AUDIO,
    "StableAudio3": AUDIO | {"global_cond_shared_embed": True},
    "Trellis2": {
        "image_model": "trellis2", "resolution": 4, "in_channels": 4, "out_channels": 4, "model_channels": 32, "cond_channels": 40,
        "num_blocks": 1, "num_heads": 2, "mlp_ratio": 2.0,
    },
}  # fmt: skip

LEFT_OUT: dict[str, str] = {
    "RT_DETR_v4": "finds objects in a picture, denoises nothing; its class has one size",
    "SAM3": "segments pictures, denoises nothing; its class has one size, 507 M parameters",
    "SAM31": "segments pictures, denoises nothing; its class has one size, 507 M parameters",
    "DepthAnything3": "estimates depth, denoises nothing; its class has sizes of 50 M parameters and more",
    "MiniMaxMusic3": "its class has one size, 2457 M parameters",
}

SMALLER: dict[str, dict[str, Config]] = {
    "comfy.ldm.anima.model": {"LLMAdapter": {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_heads": 2}},
    "comfy.ldm.wan.model": {"AudioProjModel": {"channels": 8, "intermediate_dim": 16, "output_dim": 32}},
    "comfy.ldm.hunyuan_video.model": {"ByT5Mapper": {"in_dim": 24, "out_dim": 32, "hidden_dim": 32}},
    "comfy.ldm.ace.model": {"LyricEncoder": {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 1}},
}  # fmt: skip
"""Parts that the host builds in one size, made smaller: arguments by module and class."""


@contextmanager
def smaller_parts() -> Iterator[None]:
    """The classes of ``SMALLER`` with other arguments for the time of a build."""
    kept: list[tuple[Any, str, Any]] = []
    try:
        for name, parts in SMALLER.items():
            module = sys.modules.get(name)
            for part, arguments in parts.items():
                kind = getattr(module, part, None)
                if kind is not None:
                    kept.append((module, part, kind))
                    setattr(module, part, lambda *a, kind=kind, arguments=arguments, **k: kind(*a, **(k | arguments)))
        yield
    finally:
        for module, part, kind in kept:
            setattr(module, part, kind)


def seconds() -> dict[str, torch.Tensor]:
    """What Stable Audio keeps beside its transformer: embeddings of seconds."""
    names = ("embedder.embedding.0.weights", "embedder.embedding.1.weight", "embedder.embedding.1.bias")
    shapes = ((128,), (768, 257), (768,))
    return {
        f"conditioner.conditioners.seconds_{end}.{name}": torch.zeros(shape)
        for end in ("start", "total")
        for name, shape in zip(names, shapes, strict=True)
    }


STATES: dict[str, Any] = {
    "Stable_Zero123": lambda: {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)},
    "StableAudio": seconds,
    "StableAudio3": seconds,
}
"""Tensors that a class asks for while it is built."""


UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")


def model_of(name: str, config: Config) -> Any:
    """The host's model; settings that this version does not know are left out."""
    known = getattr(comfy.supported_models, name)
    for _ in range(len(config)):
        described = known(dict(config))
        described.unet_config |= {key: value for key, value in config.items() if key in known.unet_extra_config}
        described.set_inference_dtype(torch.float32, None)
        try:
            return described.get_model(STATES.get(name, dict)(), "", device=torch.device("cpu"))
        except TypeError as error:
            unknown = UNKNOWN.search(str(error))
            if unknown is None:
                raise
            config = {key: value for key, value in config.items() if key != unknown[1]}
    raise AssertionError(name)


def build(name: str, sizes: Config) -> Any:
    """The host's model around its own class, with random weights in float32; ``sizes`` instead of those of the table."""
    with smaller_parts():
        model = model_of(name, MODELS[name] | sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.diffusion_model.state_dict().values():
            if tensor.is_floating_point():
                columns = tensor[0].numel() if tensor.ndim > 1 else 16
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(columns, 1) ** 0.5)
    model.diffusion_model.eval().requires_grad_(False)
    return model
