"""Say what a robot should do in a sentence, and get a dense reward for every step from its cameras."""

from vlm_reward._rendering import select_backend

select_backend()  # before anything imports mujoco, which reads MUJOCO_GL once
