"""Records of searches for the tests of reports."""


def epoch(number, valid=None, **more):
    return {"event": "epoch", "epoch": number, "step": number, "train_loss": 5.0 / number, "valid": valid, **more}


def pruned(n_updates=2):
    """Statistics of a search with a sparse prior over two edges and two operations; one switch lives."""
    update = {
        "gamma": [[2.0, 1e-10], [0.01, 0.02]],
        "w2h": [[3.0, 0.0], [1e-9, 1e-4]],
        "values": [[1.0, 0.0], [0.0, 0.0]],
        "alive": [[True, False], [False, False]],
        "objective": [2.0, 1.0],
    }
    return {
        "lambda": 0.005,
        "threshold": 0.0585,
        "mixture": {"nodes": [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]},
        "ops": {"nodes": ["none", "tanh", "relu"]},
        "operations": {"nodes": ["tanh", "relu"]},
        "edges": {"nodes": [[1, 0], [2, 0]]},
        "updates": [
            {"step": k, "progress": k / n_updates, "alive": 1, "tables": {"nodes": update}} for k in range(n_updates)
        ],
    }
