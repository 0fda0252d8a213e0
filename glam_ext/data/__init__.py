"""Text to batches: corpus -> tokenizer -> packed token folders -> batches. Needs neither the model nor the ops."""

from glam_ext.data.batches import Batch, BatchSampler, Whole, epoch_order, sequential_batches
from glam_ext.data.corpus import Corpus, SourceRecord
from glam_ext.data.errors import DataError
from glam_ext.data.packing import Row, pack, unpack
from glam_ext.data.token_files import Manifest, TokenFolder, write_corpus
from glam_ext.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "UNK",
    "Batch",
    "BatchSampler",
    "Corpus",
    "DataError",
    "Manifest",
    "Row",
    "SourceRecord",
    "TokenFolder",
    "Tokenizer",
    "Whole",
    "epoch_order",
    "pack",
    "sequential_batches",
    "unpack",
    "write_corpus",
]
