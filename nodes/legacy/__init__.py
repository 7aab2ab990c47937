"""The class types of packs that nobody maintains any more, so that graphs made for them run: each a translation into the core.

Most are ComfyUI_IPAdapter_plus'; those of packs for transformers are in ``flux`` and ``sd3``.

They are V1 classes because other packs call them as such (``nodes.NODE_CLASS_MAPPINGS["IPAdapterAdvanced"]().apply_ipadapter(...)``).
"""

from __future__ import annotations

from . import apply, embeds, first_version, flux, loaders, pictures, sd3, weights
from .sockets import LegacyNode

LEGACY_NODES: dict[str, tuple[type[LegacyNode], str]] = {
    "IPAdapter": (apply.IPAdapter, "IPAdapter"),
    "IPAdapterAdvanced": (apply.IPAdapterAdvanced, "IPAdapter Advanced"),
    "IPAdapterBatch": (apply.IPAdapterBatch, "IPAdapter Batch (Adv.)"),
    "IPAdapterFaceID": (apply.IPAdapterFaceID, "IPAdapter FaceID"),
    "IPAAdapterFaceIDBatch": (apply.IPAAdapterFaceIDBatch, "IPAdapter FaceID Batch"),
    "IPAdapterFaceIDKolors": (apply.IPAdapterFaceIDKolors, "IPAdapter FaceID Kolors"),
    "IPAdapterTiled": (pictures.IPAdapterTiled, "IPAdapter Tiled"),
    "IPAdapterTiledBatch": (pictures.IPAdapterTiledBatch, "IPAdapter Tiled Batch"),
    "IPAdapterEmbeds": (embeds.IPAdapterEmbeds, "IPAdapter Embeds"),
    "IPAdapterEmbedsBatch": (embeds.IPAdapterEmbedsBatch, "IPAdapter Embeds Batch"),
    "IPAdapterStyleComposition": (apply.IPAdapterStyleComposition, "IPAdapter Style & Composition SDXL"),
    "IPAdapterStyleCompositionBatch": (
        apply.IPAdapterStyleCompositionBatch,
        "IPAdapter Style & Composition Batch SDXL",
    ),
    "IPAdapterMS": (apply.IPAdapterMS, "IPAdapter Mad Scientist"),
    "IPAdapterClipVisionEnhancer": (apply.IPAdapterClipVisionEnhancer, "IPAdapter ClipVision Enhancer"),
    "IPAdapterClipVisionEnhancerBatch": (
        apply.IPAdapterClipVisionEnhancerBatch,
        "IPAdapter ClipVision Enhancer Batch",
    ),
    "IPAdapterFromParams": (apply.IPAdapterFromParams, "IPAdapter from Params"),
    "IPAdapterPreciseStyleTransfer": (apply.IPAdapterPreciseStyleTransfer, "IPAdapter Precise Style Transfer"),
    "IPAdapterPreciseStyleTransferBatch": (
        apply.IPAdapterPreciseStyleTransferBatch,
        "IPAdapter Precise Style Transfer Batch",
    ),
    "IPAdapterPreciseComposition": (apply.IPAdapterPreciseComposition, "IPAdapter Precise Composition"),
    "IPAdapterPreciseCompositionBatch": (
        apply.IPAdapterPreciseCompositionBatch,
        "IPAdapter Precise Composition Batch",
    ),
    "IPAdapterUnifiedLoader": (loaders.IPAdapterUnifiedLoader, "IPAdapter Unified Loader"),
    "IPAdapterUnifiedLoaderFaceID": (loaders.IPAdapterUnifiedLoaderFaceID, "IPAdapter Unified Loader FaceID"),
    "IPAdapterInsightFaceLoader": (loaders.IPAdapterInsightFaceLoader, "IPAdapter InsightFace Loader"),
    "IPAdapterUnifiedLoaderCommunity": (loaders.IPAdapterUnifiedLoaderCommunity, "IPAdapter Unified Loader Community"),
    "IPAdapterModelLoader": (loaders.IPAdapterModelLoader, "IPAdapter Model Loader"),
    "IPAdapterEncoder": (embeds.IPAdapterEncoder, "IPAdapter Encoder"),
    "IPAdapterCombineEmbeds": (embeds.IPAdapterCombineEmbeds, "IPAdapter Combine Embeds"),
    "IPAdapterNoise": (pictures.IPAdapterNoise, "IPAdapter Noise"),
    "PrepImageForClipVision": (pictures.PrepImageForClipVision, "Prep Image For ClipVision"),
    "IPAdapterSaveEmbeds": (embeds.IPAdapterSaveEmbeds, "IPAdapter Save Embeds"),
    "IPAdapterLoadEmbeds": (embeds.IPAdapterLoadEmbeds, "IPAdapter Load Embeds"),
    "IPAdapterWeights": (weights.IPAdapterWeights, "IPAdapter Weights"),
    "IPAdapterCombineWeights": (weights.IPAdapterCombineWeights, "IPAdapter Combine Weights"),
    "IPAdapterWeightsFromStrategy": (weights.IPAdapterWeightsFromStrategy, "IPAdapter Weights From Strategy"),
    "IPAdapterPromptScheduleFromWeightsStrategy": (
        weights.IPAdapterPromptScheduleFromWeightsStrategy,
        "Prompt Schedule From Weights Strategy",
    ),
    "IPAdapterRegionalConditioning": (weights.IPAdapterRegionalConditioning, "IPAdapter Regional Conditioning"),
    "IPAdapterCombineParams": (weights.IPAdapterCombineParams, "IPAdapter Combine Params"),
    # before 2024-03-23
    "IPAdapterCLIPVisionEncode": (first_version.IPAdapterCLIPVisionEncode, "CLIP Vision Encode (IPAdapter)"),
    "IPAdapterApply": (first_version.IPAdapterApply, "Apply IPAdapter"),
    "IPAdapterApplyFaceID": (first_version.IPAdapterApplyFaceID, "Apply IPAdapter FaceID"),
    "InsightFaceLoader": (loaders.InsightFaceLoader, "Load InsightFace"),
    "IPAdapterApplyEncoded": (first_version.IPAdapterApplyEncoded, "Apply IPAdapter from Encoded"),
    "IPAdapterTilesMasked": (first_version.IPAdapterTilesMasked, "IPAdapter Masked Tiles (experimental)"),
    "IPAdapterBatchEmbeds": (first_version.IPAdapterBatchEmbeds, "IPAdapter Batch Embeds"),
    "PrepImageForInsightFace": (first_version.PrepImageForInsightFace, "Prepare Image For InsightFace"),
    # x-flux-comfyui
    "LoadFluxIPAdapter": (flux.LoadFluxIPAdapter, "Load Flux IPAdapter"),
    "ApplyFluxIPAdapter": (flux.ApplyFluxIPAdapter, "Apply Flux IPAdapter"),
    "ApplyAdvancedFluxIPAdapter": (flux.ApplyAdvancedFluxIPAdapter, "Apply Advanced Flux IPAdapter"),
    "FluxLoraLoader": (flux.FluxLoraLoader, "Load Flux LoRA"),
    "XlabsSampler": (flux.XlabsSampler, "Xlabs Sampler"),
    # ComfyUI-IPAdapter-Flux
    "IPAdapterFluxLoader": (flux.IPAdapterFluxLoader, "Load IPAdapter Flux Model"),
    "ApplyIPAdapterFlux": (flux.ApplyIPAdapterFlux, "Apply IPAdapter Flux Model"),
    "IPAdapterFluxLoaderAdvanced": (flux.IPAdapterFluxLoaderAdvanced, "Load IPAdapter Flux Model (Advanced)"),
    "ApplyIPAdapterFluxAdvanced": (flux.ApplyIPAdapterFluxAdvanced, "Apply IPAdapter Flux Model (Advanced)"),
    # ComfyUI-InstantX-IPAdapter-SD3
    "IPAdapterSD3Loader": (sd3.IPAdapterSD3Loader, "Load IPAdapter SD3 Model"),
    "ApplyIPAdapterSD3": (sd3.ApplyIPAdapterSD3, "Apply IPAdapter SD3 Model"),
}
"""Class type to class and title."""
