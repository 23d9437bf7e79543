"""A trained `spikegpt-driven` in other programs' simulators, from its NIR graph, spike by spike.

    spikescale data prepare --source shakespeare --tokenizer byte --output data/shakespeare-byte
    python launch/pretrain.py --config configs/run/tiny.yaml name=driven model.variant=spikegpt-driven \\
        train.steps=250 train.batch_size=8 train.lr=2e-3 train.optimizer=adamw train.weight_decay=0.1 \\
        train.schedule=wsd train.decay_fraction=0.3 train.warmup_steps=25 train.precision=bfloat16
    python benchmarks/nir_simulation.py runs/driven --data data/shakespeare-byte

The model is exported (`spikescale export --format nir`) and the graph read back. Then the test split's first
tokens are read twice: by the model itself, and with every neuron and projection stepped by a simulator, token
by token, while a host computes what NIR has no nodes for. Counted are neurons and tokens where only one of
the two fired.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from common import positive, report

from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.stream import split_tokens
from spikescale.interop.nir_graph import read_nir
from spikescale.interop.nir_simulate import GRAPH, Simulator, cosimulate, host_model
from spikescale.interop.save import export_model


def main() -> None:
    """Export, simulate, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument("--data", type=Path, required=True, help="data prepared with the model's tokenizer")
    parser.add_argument("--tokens", type=positive, default=512, help="how many are read (default: 512)")
    default = Path(__file__).parent / "results" / "nir_simulation.json"
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes")
    arguments = parser.parse_args()
    manifest = load_manifest(arguments.data)
    ids = np.asarray(split_tokens(manifest, "test")[: arguments.tokens]).astype(np.int64)
    tokens = torch.from_numpy(ids)[None]
    rows, results = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "nir"
        loaded = export_model(arguments.model, folder, "nir")
        with torch.no_grad():
            expected, _ = loaded.model(tokens)
        for simulator in get_args(Simulator):
            logits, parts = cosimulate(host_model(folder), read_nir(folder / GRAPH), tokens, simulator)
            result: dict[str, Any] = {
                "simulator": simulator,
                "parts": len(parts),
                "neurons_times_tokens": sum(part.neurons for part in parts),
                "spikes": sum(part.spikes for part in parts),
                "differing": sum(part.differing for part in parts),
                "largest_logit": float(expected.abs().max()),
                "largest_difference_of_logits": float((logits - expected).abs().max()),
            }
            results.append(result)
            rows.append(
                [
                    simulator,
                    str(result["parts"]),
                    f"{result['neurons_times_tokens']:,}",
                    f"{result['spikes']:,}",
                    str(result["differing"]),
                    f"{result['largest_difference_of_logits']:.2g} of {result['largest_logit']:.3g}",
                ]
            )
    config = loaded.config
    about = {
        "layers": config.layers,
        "width": config.width,
        "parameters": loaded.model.count_parameters(),
        "info": loaded.info,
        "tokens": len(ids),
        "rows": results,
    }
    columns = ["simulator", "parts", "neurons x tokens", "spikes", "differing", "logits differ by"]
    report(
        f"{config.layers} layers, width {config.width}, {len(ids)} tokens",
        columns,
        rows,
        about,
        arguments.output,
    )


if __name__ == "__main__":
    main()
