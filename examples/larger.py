"""A verifier of your own: any function of (task, completion, trajectory). It runs in a worker process with limits."""

import re


def judge(task: dict, completion: str, trajectory: dict) -> dict:
    """Accept if the last number, or the word "equal", is the answer."""
    said = re.findall(r"\d+|equal", completion.lower())
    if not said:
        return {"accepted": False, "reason": "no number and no 'equal' in the answer"}
    return {"accepted": said[-1] == task["answer"], "reason": f"said {said[-1]}", "key": said[-1]}
