#!/usr/bin/env bash
# The main job, end to end, on a CPU: train, evaluate beside BM25, show the experts and five searches, export.
# Everything goes to runs/demo/. Run again, it sees what is done and does not do it again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ready_venv
sample=moe_embed/sample
run=runs/demo
mkdir -p $run
start=$SECONDS

machine=$(python -m moe_embed.doctor | grep -E "^(python|devices|cores|multiply)")
echo "$machine"
python -m moe_embed.train --config=configs/demo.py --workdir=$run "$@"

newer() { [ -e "$1" ] && [ -z "$(find $run/checkpoints -newer "$1" -name digests.json)" ]; }

echo; echo "== held-out retrieval, pages that no training pair came from (%)"
if newer $run/evaluation.json; then
    python -m moe_embed.evaluate --show=$run/evaluation.json
else
    tasks=$(printf '%s,' $sample/tasks/*)
    python -m moe_embed.evaluate --model=$run --task="${tasks%,}" --baseline=bm25 --output=$run/evaluation.json
fi

echo; echo "== the run, and which experts read which language"
python -m moe_embed.report --workdir=$run
python -m moe_embed.report --workdir=$run --output=$run/report.html --evaluation=$run/evaluation.json

echo; echo "== export"
if newer $run/export/parity.json; then echo "$run/export is up to date."; else python -m moe_embed.export --model=$run --output=$run/export; fi

echo; echo "== five held-out headings, and the English passages found for them"
python -m moe_embed.embed --model=$run/export --search=$sample/tasks/xling-libreoffice-help-ja-en/corpus.jsonl --input=$sample/queries.jsonl --top_k=2

cat <<END

done in $((SECONDS - start)) s, on a machine that does $(sed -n 's/^multiply *\([^(]*\) (.*/\1/p' <<<"$machine").
  checkpoint  $(find $run/checkpoints -mindepth 1 -maxdepth 1 -type d | sort -V | tail -n 1)
  export      $run/export   (SentenceTransformer("$run/export", trust_remote_code=True))
  figures     $run/evaluation.json
  report      $run/report.html   (open it in a browser)
search with your own words:
  .venv/bin/python -m moe_embed.embed --model=$run --search=$sample/tasks/xling-libreoffice-help-ja-en/corpus.jsonl
END
