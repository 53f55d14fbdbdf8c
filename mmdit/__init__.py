"""Every network of a text-to-image pipeline: MMDiT, text encoders and their tokenizers, autoencoder."""

from .autoencoder import Autoencoder, AutoencoderConfig
from .chat_tokenizers import MistralTokenizer, QwenTokenizer
from .clip import ClipConfig, ClipTextEncoder
from .config import PRESETS, MMDiTConfig
from .decoder import DecoderConfig, TextDecoder
from .meta import on_meta
from .model import MMDiT
from .t5 import T5Config, T5Encoder
from .tokenizers import ClipTokenizer, T5Tokenizer
from .trace import trace

__all__ = [
    "PRESETS", "Autoencoder", "AutoencoderConfig", "ClipConfig", "ClipTextEncoder", "ClipTokenizer",
    "DecoderConfig", "MMDiT", "MMDiTConfig", "MistralTokenizer", "QwenTokenizer", "T5Config", "T5Encoder",
    "T5Tokenizer", "TextDecoder", "on_meta", "trace",
]
