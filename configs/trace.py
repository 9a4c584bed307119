"""Where does the time go? A torch trace of steps 3 to 7 of pretrain.py, for chrome://tracing.

    python pretrain.py configs/toy.py configs/trace.py --max_steps=8    # -> out/trace/trace_0.json

Each rank writes its own. It replaces after_step, so it does not go with an idea that does. Another
trace needs another out_dir: this run has reached its end.
"""
import os

from torch import profiler

from configs import original

out_dir = "out/trace"
_running = []  # the profiler, from the end of the first step on


def after_step(clip, step, total_steps, config):
    original("after_step")(clip, step, total_steps, config)
    if _running:
        _running[0].step()
        return
    file = f"{config.out_dir}/trace_{os.environ.get('RANK', 0)}.json"
    _running.append(profiler.profile(
        schedule=profiler.schedule(wait=0, warmup=1, active=5, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(file)))
    _running[0].start()
