def write(found, out):
    import json

    out.mkdir(parents=True, exist_ok=True)
    (out / "against_peers.json").write_text(json.dumps(found))
