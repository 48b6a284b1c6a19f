"""How well (evaluate), why (ablate), how fast (bench). May be deleted: no stage needs it."""
