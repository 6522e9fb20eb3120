megatron-samoe train-tokenizer --type byte-bpe --input {text} --vocab-size {vocab_size} --output-prefix data/tokenizer
megatron-samoe preprocess --input {text} {cut}--tokenizer-type HuggingFaceTokenizer \
  --tokenizer-model data/tokenizer.json --append-eod --output-prefix data/corpus
megatron-samoe pretrain --config config.yaml
megatron-samoe generate --load runs/first --prompt "It was"
megatron-samoe serve --load runs/first
