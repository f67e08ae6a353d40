"""Rewards: functions, verifiers, the sandbox, the judge."""
