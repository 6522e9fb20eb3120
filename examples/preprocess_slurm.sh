#!/bin/sh
# Preprocesses a corpus of many files with a Slurm job array, one part of the files per task, then joins the parts.
#
#   sbatch --array=0-31 examples/preprocess_slurm.sh /data/corpus '*.jsonl.zst' /data/out/web /models/tokenizer.json
#
# A task that was killed or preempted goes on where it was when its array index is submitted again (--resume).
# When all tasks are done:
#
#   python tools/merge_datasets.py --input /data/out/web_parts --output-prefix /data/out/web_text_document
#
# The parts are contiguous runs of the sorted file names, so the result is the same as that of one run over all files.
# The tools it calls are tested part by part; the job array itself has not been run: no cluster was at hand.
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -eu

FOLDER=${1:?folder of the corpus}
PATTERN=${2:?pattern of its files, quoted}
OUTPUT=${3:?prefix of the output}
TOKENIZER=${4:?tokenizer.json}
PART=$(printf '%05d' "$SLURM_ARRAY_TASK_ID")

mkdir -p "${OUTPUT}_parts"
exec python tools/preprocess_data.py \
  --input "$FOLDER/$PATTERN" \
  --input-shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
  --output-prefix "${OUTPUT}_parts/$PART" \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --append-eod \
  --workers "${SLURM_CPUS_PER_TASK:-1}" \
  --on-bad-input skip \
  --resume
