"""Options of corpora and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_samoe.config import needs
from megatron_samoe.config.option import AT_LEAST_ZERO, BY_RULES, option

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "ByteTokenizer"]


@dataclass(frozen=True)
class DataConfig:
    """The training data, in Megatron's indexed format, and the tokenizer that made it."""

    data_path: tuple[str, ...] = option(())
    """Dataset prefix (path without .bin/.idx), or weight prefix weight prefix ... for a blend."""
    split: str = option("969,30,1")
    """Shares of training, validation and test documents in --data-path."""
    train_data_path: tuple[str, ...] = option(())
    """Prefixes of the training split only, instead of --data-path."""
    valid_data_path: tuple[str, ...] = option(())
    """Prefixes of the validation split only."""
    test_data_path: tuple[str, ...] = option(())
    """Prefixes of the test split only. Test data, if any, are evaluated once, after the last step."""
    data_cache_path: str | None = option(None)
    """Folder for sample indices; next to the data if not given."""
    mock_data: bool = option(False)
    """Train on random tokens, to measure speed without a corpus."""
    num_workers: int = option(1, range=AT_LEAST_ZERO, largest=4096)
    """Threads that read samples ahead; 0 to read them in the training loop."""
    dataloader_type: Literal["single", "cyclic"] = option("single")
    """single: the dataset's order, as Megatron; cyclic: shuffled anew each epoch."""
    no_mmap_bin_files: bool = option(False)
    """Read .bin files with ordinary reads rather than memory maps."""
    reset_position_ids: bool = option(False)
    """Count positions from 0 after every end-of-document token."""
    reset_attention_mask: bool = option(False)
    """Let no token attend to an earlier document."""
    eod_mask_loss: bool = option(False)
    """Leave the prediction that follows an end-of-document token out of the loss."""
    tokenizer_type: TokenizerType = option("ByteTokenizer")  # noqa: RUF009
    """Kind of the tokenizer."""
    tokenizer_model: str | None = option(None, needs=needs.TOKENIZER_FILE)
    """SentencePiece .model, or tokenizer.json."""
    vocab_file: str | None = option(None)
    """GPT-2 vocabulary (JSON)."""
    merge_file: str | None = option(None)
    """GPT-2 merges."""
    vocab_size: int | None = option(None, range=BY_RULES)
    """Vocabulary before padding. Derived if not given: the tokenizer's."""
