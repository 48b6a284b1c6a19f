"""Progress of anything that takes long."""
import contextlib
import os
import sys
import time

from tqdm import tqdm


class Progress:
    """A progress bar on a terminal, elsewhere a plain line every five seconds."""

    def __init__(self, total, initial=0, unit="step"):
        self.done, self.total, self.unit = initial, total, unit
        self.last, self.start = time.time(), (initial, time.time())
        self.quiet = int(os.environ.get("RANK", 0)) > 0
        show_bar = sys.stderr and sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True,
                        leave=False) if show_bar else None

    def __call__(self, n=1, **metrics):
        self.done += n
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                         for k, v in metrics.items())
        if self.bar:
            self.bar.set_postfix_str(text[:60], refresh=False)
            self.bar.update(n)
        elif not self.quiet and (time.time() - self.last > 5 or self.done == self.total):
            self.last = time.time()
            rate = (self.done - self.start[0]) / max(1e-9, self.last - self.start[1])
            left = f"{(self.total - self.done) / rate / 60:.1f} min left" if rate else ""
            with contextlib.suppress(OSError, ValueError):
                print(f"{self.unit} {self.done}/{self.total}  {rate:.3g}/s  {left}  {text}",
                      flush=True)
        if self.bar and self.done == self.total:
            self.bar.close()
