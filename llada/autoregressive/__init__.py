"""An autoregressive model as teacher or verifier."""
