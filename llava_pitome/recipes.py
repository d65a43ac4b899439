"""Named ways to merge: what a MergeConfig holds beside how far it goes."""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "parameters": {"energy": "elu"},
        "early_method": "tome",
        "early_depth": 13 / 24,  # layers 0 to 12 of CLIP-L's 24
        "metric": "hidden",
        "site": "block",
        "size_weighted": False,
        "proportional": False,
        "order": "method",
    },
    "best": {  # eval/results/search.json: the last three fields were what eval/search.py was started from
        "parameters": {"candidates": 6.0},
        "prefix_share": 0.5,
        "llm_proportional": True,
        "positions": "original",
    },
}
