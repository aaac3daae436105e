#!/usr/bin/env bash
# Every stage of Nomic Embed v2 in order; trainings, filter and mine print a figure before and after, and where one did not help the script stops.
#   bash launch/nomic_v2.sh --tiny             on the text that ships here, under runs/nomic_v2/, minutes on a laptop's CPU
# Run again, it goes on where it stopped. At full size run the same verbs with the presets of configs/nomic_v2/*.py.
set -euo pipefail
if [ "${1:-}" != --tiny ] || [ $# -ne 1 ]; then
    sed -n '2,4s/^# //p' "$0"
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ready_venv
sample=moe_embed/sample
run=runs/nomic_v2
mkdir -p $run
start=$SECONDS

stage() { echo; echo "== $1 ($((SECONDS - start)) s)"; }
train() { python -m moe_embed.train --config="configs/nomic_v2/$1.py:tiny" --workdir=$run/"$1" "${@:2}"; }
improved() { # the dev figure of a contrastive stage: at its start and at its end
    python - "$1/evaluations.jsonl" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
first, last = rows[0]["ndcg"], rows[-1]["ndcg"]
print(f"dev nDCG@10  before {first:.3f}  after {last:.3f}")
sys.exit(None if last > first else "this stage did not help: the dev figure is not above its start")
PY
}

stage "1 masked language modelling, dense, from scratch"
train mlm
python - $run/mlm/metrics.jsonl <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
last = sum(row["mlm_loss"] for row in rows[-50:]) / 50
print(f"MLM loss  first {rows[0]['mlm_loss']:.3f}  mean of the last 50 steps {last:.3f}  unigram entropy {rows[0]['unigram_entropy']:.3f}")
sys.exit(None if last < rows[0]["unigram_entropy"] else "this stage did not help: the loss is not below the unigram entropy")
PY

stage "2 upcycling to 8 experts"
python -m moe_embed.upcycle --model=$run/mlm --output=$run/upcycled

stage "3 contrastive pretraining"
train pretrain --init_from=$run/upcycled
improved $run/pretrain

stage "4 consistency filtering, with one document in ten swapped for another's beforehand"
python - $sample/pairs/crosslingual.jsonl.gz $run/noisy.jsonl <<'PY'
import gzip, json, random, sys
rows = [json.loads(line) for line in gzip.open(sys.argv[1], "rt", encoding="utf-8")]
rng = random.Random(0)
wrong = rng.sample(range(len(rows)), len(rows) // 10)
documents = [rows[i]["document"] for i in wrong]
for i, document in zip(wrong, documents[1:] + documents[:1]):
    rows[i] |= {"swapped": rows[i]["document"] != document, "document": document}
with open(sys.argv[2], "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
PY
python -m moe_embed.filter --model=$run/pretrain --pairs=$run/noisy.jsonl --output=$run/filtered.jsonl --top_k=20
python - $run/noisy.jsonl $run/filtered.jsonl <<'PY'
import json, sys
def share(path):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return sum(row.get("swapped", False) for row in rows) / len(rows), len(rows)
(before, n), (after, kept) = map(share, sys.argv[1:])
print(f"wrong pairs  before {before:.1%} of {n}  after {after:.1%} of {kept}")
sys.exit(None if after < before / 2 else "this stage did not help: it kept half of the wrong pairs or more")
PY

stage "5 mining hard negatives"
python -m moe_embed.mine --model=$run/pretrain --pairs=$run/filtered.jsonl --output=$run/mined.jsonl --num_negatives=4
python - $run/mined.jsonl <<'PY'
import collections, json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
positives = collections.defaultdict(set)
for row in rows:
    positives[row["query"]].add(row["document"])
known = sum(text in positives[row["query"]] for row in rows for text in row["negatives"])
full = sum(len(row["negatives"]) == 4 for row in rows)
print(f"negatives  before 0  after {sum(len(row['negatives']) for row in rows)} on {len(rows)} pairs ({full} have 4); known positives among them: {known}")
sys.exit(None if known == 0 and full else "this stage did not help: known positives among the negatives, or none found")
PY

stage "6 finetuning with hard negatives and Matryoshka prefixes"
train finetune --init_from=$run/pretrain --config.data.sources=$run/mined.jsonl
improved $run/finetune

stage "7 evaluation, held-out pages"
tasks=$(printf '%s,' $sample/tasks/xling-*)
python -m moe_embed.evaluate --model=$run/finetune --task="${tasks%,}" --dims=128,32 --output=$run/evaluation.json

stage "8 export, and back"
python -m moe_embed.export --model=$run/finetune --output=$run/export
python -m moe_embed.import_hf --model=$run/export --output=$run/imported
python -m moe_embed.evaluate --model=$run/imported --task="${tasks%,}" --dims=128,32 --output=$run/evaluation_imported.json > $run/imported.txt
python - $run/evaluation.json $run/evaluation_imported.json <<'PY'
import json, sys
figures = [{task: {k: v for k, v in of.items() if k in ("ndcg@10", "recall@10", "mrr@10", "dims", "queries")}
            for task, of in json.load(open(path, encoding="utf-8")).items()} for path in sys.argv[1:]]
same = figures[0] == figures[1]
sys.exit(None if same else "the exported model gives other figures")
PY
echo "the exported model gives the same figures to the last digit."

echo; echo "all stages helped, in $((SECONDS - start)) s."
