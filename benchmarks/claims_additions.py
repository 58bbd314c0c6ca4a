"""The small additions that benchmarks/claims.py measures, each beside the baseline without it. Each is a flag
of train_dreambooth_lora.py."""

ADDITIONS = (
    # name, label, flags
    ("huber", "Huber loss", "--huber_c 0.1"),
    ("no-low-noise", "timesteps 200 to 999", "--min_timestep 200"),
    ("no-high-noise", "timesteps 0 to 799", "--max_timestep 800"),
    ("bias-high", "high noise more often", "--timestep_bias 1"),
    ("bias-low", "low noise more often", "--timestep_bias -1"),
    ("lora-plus", "LoRA+, ratio 4", "--lora_plus_ratio 4"),
    ("min-snr", "Min-SNR weights", "--snr_gamma 5"),
    ("debiased", "debiased weights", "--debiased_estimation"),
    ("perturbation", "input perturbation", "--input_perturbation 0.1"),
)
AVERAGED = "averaged"  # the arm whose adapter is the mean of the last checkpoints
