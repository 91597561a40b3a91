#!/bin/sh
# Every method at about 25, 50 and 75 % of the FFN, three seeds, equal adaptation tokens: the study behind pays.csv and
# share.png in this folder. Some hours on two cores; whatever is there already is not computed again.
#   analysis/study/run.sh BACKBONE NOVELS BLIMP RUNS
# BACKBONE: a small Llama folder; NOVELS: a folder with train.jsonl.gz and validation.jsonl.gz (title, text);
# BLIMP: a folder with the 67 <paradigm>.jsonl.gz; RUNS: where everything goes.
set -eu
bin=$(dirname "$0")/../../.venv/bin
backbone=$1 novels=$2 blimp=$3 runs=$4

study() {
    "$bin/moesaic" -m backbone=hf backbone.path="$backbone" backbone.dtype=float32 \
        data=novels data.train="$novels/train.jsonl.gz" data.heldout="$novels/validation.jsonl.gz" tokens.train=2000000 \
        evaluate=blimp evaluate.tasks.blimp.folder="$blimp" evaluate.tasks.blimp.limit_per_paradigm=5 \
        evaluate.perplexity.max_tokens=12288 evaluate.perplexity.context=256 bench=none \
        adapt.fit.steps=40 adapt.fit.warmup_steps=4 adapt.fit.precision=bf16-mixed \
        adapt.relufy_fit.steps=40 adapt.relufy_fit.warmup_steps=4 adapt.relufy_fit.precision=bf16-mixed \
        adapt.router_fit.steps=30 adapt.router_fit.warmup_steps=2 paths.runs="$runs" study=every_method "$@"
}

trained="method=dense,dense_same_tokens,factorllm,llama_moe,dynamoe,flextron,matformer"
moefication="method=moefication method.phases.router.fit.steps=100"
d2dmoe="method=d2dmoe method.budgets=[0.05,0.2,0.5] method.phases.router.fit.steps=100"
# Affinity mass, the default capacity, cannot reach half of the FFN (experiment=etr_top_l).
resonance="method=expert_token_resonance +method/capacity=fixed"
lte="method=lte method.phases.soft.eta=0.1,0.3,0.5,1"
steep="method=lte method.phases.soft.epsilon=0.01"  # the barrier that decides too early, beside the default
for seeds in "seed=0" "seed=1,2 controls=false"; do
    for method in "$trained" "$moefication" "$d2dmoe" "$resonance" "$lte" "$steep method.phases.soft.eta=1,4"; do
        study $method $seeds
    done
    study method=static_slice method.num_blocks=8 "method.budgets=[1,2,4,6,7]" $seeds
done
study $steep method.phases.soft.eta=0.3,2 controls=false
study $steep method.phases.soft.eta=8
# What trains nothing is the same for every seed, or nearly; it stands beside an untrained slice.
study method=static_slice method.num_blocks=8 "method.budgets=[1,2,3,4,5,6,7]" method.phases.finetune=null
study method=cmoe
study method=cats "method.budgets=[0.25,0.5,0.75]"
study method=deja_vu method.phases.predictor.fit.steps=150
study method=teal method.scope=ffn method.search_tokens=256
"$bin/moesaic-report" "$runs"

# What an uneven spread of the budget over layers gives, untrained (seed 0): allocation.csv.
blocks="method.budgets=[2,4] controls=false study=allocation"
for rule in uniform solved greedy; do
    study method=static_slice method.num_blocks=8 method.phases.finetune=null $blocks +method/allocate=$rule
    study method=moefication method.partition.num_blocks=8 method.select.k=4 method.phases.heal=null \
        method.phases.router.fit.steps=100 $blocks +method/allocate=$rule
    study method=cats method.partition.block_size=128 "method.budgets=[0.5]" controls=false study=allocation \
        +method/allocate=$rule
done
