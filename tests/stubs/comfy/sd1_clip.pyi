from typing import Any

from torch import nn

__file__: str

class SDClipModel(nn.Module):
    transformer: Any
    operations: Any
    def __init__(
        self,
        device: Any = ...,
        max_length: int = ...,
        *,
        textmodel_json_config: dict[str, Any],
        dtype: Any = ...,
        special_tokens: dict[str, int],
        return_projected_pooled: bool = ...,
        model_options: dict[str, Any],
    ) -> None: ...

class SDTokenizer:
    def __init__(
        self,
        tokenizer_path: str,
        max_length: int,
        *,
        embedding_directory: Any,
        embedding_size: int,
        tokenizer_data: dict[str, Any],
    ) -> None: ...

class SD1Tokenizer:
    def __init__(
        self, embedding_directory: Any, tokenizer_data: dict[str, Any], *, tokenizer: type[SDTokenizer]
    ) -> None: ...

class SD1ClipModel(nn.Module):
    def __init__(
        self, device: Any, dtype: Any, model_options: dict[str, Any], *, clip_model: type[SDClipModel]
    ) -> None: ...
