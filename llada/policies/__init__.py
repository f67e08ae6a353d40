"""DPO, ELBO-KTO and GRPO: what preference and reinforcement stages share."""
