"""The same graphs by this package, in a separate process, so that memory is measured alike."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import circuits

torch.set_num_threads(1)
folder, answer = Path(sys.argv[1]), Path(sys.argv[2])
case = json.loads((folder / "case.json").read_text())
model = circuits.build_model(case["config"], load_file(folder / "model.safetensors"), device="cpu")
method = circuits.AttributionGraph(circuits.load_transcoders(folder / "clt"))
tokens = torch.tensor(case["tokens"])

for line in sys.stdin:
    if line.strip() != "again":
        break
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    graph = method.attribute(model, tokens)
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    took["peak_above_loaded_bytes"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ) * 1024
    features = graph.nodes.kind == 0
    columns = torch.stack([graph.nodes.layer, graph.nodes.position, graph.nodes.index], 1)[features]
    save_file(
        {"adjacency": graph.adjacency(), "features": columns}, answer.with_suffix(".safetensors")
    )
    answer.write_text(json.dumps({"edges": len(graph), "nodes": len(graph.nodes)}))
    print("took", json.dumps(took), flush=True)
