"""Scheduler configs after the files of published repositories, diffusers 0.0.4 to 0.3x.

Keys and values are theirs as far as they are remembered, without those that say nothing
(`_diffusers_version`). `NOW` holds what an old config means in today's words, where stock diffusers
no longer reads it.
"""

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LDM = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
DDPM = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COMMON = {"num_train_timesteps": 1000, "trained_betas": None}
SD_LEFT_OVERS = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
DPM = {
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lower_order_final": True,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "variance_type": None,
}
COGVIDEO = {
    **SD,
    **COMMON,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}

# name: (class, the other keys)
CONFIGS = {
    "google/ddpm-cifar10-32, 0.0.4": (
        "DDPMScheduler",
        {**DDPM, "timesteps": 1000, "clip_predicted_image": True, "variance_type": "fixed_large"},
    ),
    "google/ddpm-cifar10-32": (
        "DDPMScheduler",
        {**DDPM, **COMMON, "clip_sample": True, "variance_type": "fixed_large"},
    ),
    "google/ddpm-celebahq-256": (
        "DDPMScheduler",
        {**DDPM, **COMMON, "clip_sample": True, "variance_type": "fixed_small"},
    ),
    "google/ddpm-ema-church-256, 0.1": (
        "DDPMScheduler",
        {**DDPM, **COMMON, "clip_sample": True, "tensor_format": "pt", "timestep_values": None},
    ),
    "google/ddpm-cat-256, all keys": (
        "DDPMScheduler",
        {
            **DDPM,
            **COMMON,
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "steps_offset": 0,
            "thresholding": False,
            "timestep_spacing": "leading",
            "variance_type": "fixed_small",
        },
    ),
    "train_unconditional of 0.6, x_0": (
        "DDPMScheduler",
        {**DDPM, **COMMON, "clip_sample": True, "predict_epsilon": False},
    ),
    "train_unconditional of 0.9, eps": (
        "DDPMScheduler",
        {**DDPM, **COMMON, "clip_sample": True, "predict_epsilon": True},
    ),
    "butterflies course, cosine": (
        "DDPMScheduler",
        {**COMMON, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02},
    ),
    "a file with T alone": ("DDPMScheduler", {"num_train_timesteps": 1000}),
    "CompVis/ldm-celebahq-256, 0.0.4": (
        "DDIMScheduler",
        {**LDM, **COMMON, "clip_sample": False, "timestep_values": None},
    ),
    "CompVis/ldm-text2im-large-256": (
        "DDIMScheduler",
        {**SD, **COMMON, "clip_sample": False, "timestep_values": None},
    ),
    "CompVis/stable-diffusion-v1-1, 0.2": (
        "PNDMScheduler",
        {**SD, **COMMON, "skip_prk_steps": True, "tensor_format": "pt"},
    ),
    "CompVis/stable-diffusion-v1-4": (
        "PNDMScheduler",
        {**SD, **COMMON, **SD_LEFT_OVERS, "steps_offset": 1},
    ),
    "runwayml/stable-diffusion-v1-5, Flax": (
        "FlaxPNDMScheduler",
        {**SD, **COMMON, **SD_LEFT_OVERS, "steps_offset": 1},
    ),
    "runwayml/stable-diffusion-inpainting": (
        "DDIMScheduler",
        {**SD, **COMMON, **SD_LEFT_OVERS, "steps_offset": 1},
    ),
    "lambdalabs/sd-image-variations": (
        "PNDMScheduler",
        {**SD, **COMMON, **SD_LEFT_OVERS, "set_alpha_to_one": True},
    ),
    "stabilityai/stable-diffusion-2": (
        "DDIMScheduler",
        {**SD, **COMMON, **SD_LEFT_OVERS, "steps_offset": 1, "prediction_type": "v_prediction"},
    ),
    "stabilityai/stable-diffusion-2-1-base": (
        "PNDMScheduler",
        {**SD, **COMMON, **SD_LEFT_OVERS, "steps_offset": 1, "prediction_type": "epsilon"},
    ),
    "stabilityai/stable-diffusion-x4-upscaler": (
        "DDIMScheduler",
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            **COMMON,
            **SD_LEFT_OVERS,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "EulerDiscreteScheduler",
        {
            **SD,
            **COMMON,
            **SD_LEFT_OVERS,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
    ),
    "stabilityai/sdxl-turbo": (
        "EulerAncestralDiscreteScheduler",
        {
            **SD,
            **COMMON,
            **SD_LEFT_OVERS,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "steps_offset": 1,
            "timestep_spacing": "trailing",
        },
    ),
    "an SD checkpoint on Euler, 0.14": (
        "EulerDiscreteScheduler",
        {**SD, **COMMON, "interpolation_type": "linear", "prediction_type": "epsilon"},
    ),
    "an SD checkpoint on LMS": ("LMSDiscreteScheduler", {**SD, **COMMON, **SD_LEFT_OVERS}),
    "an SD checkpoint on Heun": ("HeunDiscreteScheduler", {**SD, **COMMON, "steps_offset": 1}),
    "an SD checkpoint on DPM++ 2M Karras": (
        "DPMSolverMultistepScheduler",
        {**SD, **COMMON, **DPM, "use_karras_sigmas": True},
    ),
    "an SD checkpoint on DPM++, 0.10": (
        "DPMSolverMultistepScheduler",
        {**SD, **COMMON, "solver_order": 2, "predict_epsilon": True, "solver_type": "midpoint"},
    ),
    "an SD checkpoint on UniPC": (
        "UniPCMultistepScheduler",
        {**SD, **COMMON, "predict_x0": True, "solver_type": "bh2", "solver_order": 2},
    ),
    "a checkpoint on singlestep DPM-Solver": (
        "DPMSolverSinglestepScheduler",
        {**DDPM, **COMMON, "solver_order": 2, "algorithm_type": "dpmsolver++"},
    ),
    "SimianLuo/LCM_Dreamshaper_v7": (
        "LCMScheduler",
        {
            **SD,
            **COMMON,
            "clip_sample": False,
            "original_inference_steps": 50,
            "prediction_type": "epsilon",
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "leading",
        },
    ),
    "latent-consistency/lcm-sdxl": (
        "LCMScheduler",
        {
            **SD,
            **COMMON,
            **SD_LEFT_OVERS,
            "interpolation_type": "linear",
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
            "steps_offset": 1,
            "use_karras_sigmas": False,
        },
    ),
    "h1t/TCD-SDXL-LoRA": (
        "TCDScheduler",
        {**SD, **COMMON, "original_inference_steps": 50, "timestep_scaling": 10.0},
    ),
    "THUDM/CogVideoX-2b": ("CogVideoXDDIMScheduler", {**COGVIDEO, "snr_shift_scale": 3.0}),
    "THUDM/CogVideoX-5b": ("CogVideoXDPMScheduler", {**COGVIDEO, "snr_shift_scale": 1.0}),
    "THUDM/CogView3-Plus-3B": ("CogVideoXDDIMScheduler", {**COGVIDEO, "snr_shift_scale": 4.0}),
    "CogVideoX, its defaults": ("CogVideoXDDIMScheduler", {"clip_sample": False}),
    "DeepFloyd/IF-I-XL": (
        "DDPMScheduler",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            **COMMON,
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.95,
            "prediction_type": "epsilon",
            "sample_max_value": 1.5,
            "thresholding": True,
            "variance_type": "learned_range",
        },
    ),
    "kandinsky-community/kandinsky-2-1": (
        "DDIMScheduler",
        {
            "beta_schedule": "linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            **COMMON,
            "clip_sample": False,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "thresholding": False,
        },
    ),
    "kandinsky-community/kandinsky-2-2-prior": (
        "UnCLIPScheduler",
        {
            "clip_sample": True,
            "clip_sample_range": 5.0,
            "num_train_timesteps": 1000,
            "prediction_type": "sample",
            "variance_type": "fixed_small_log",
        },
    ),
    "kakaobrain/karlo-v1-alpha, decoder": (
        "UnCLIPScheduler",
        {
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "variance_type": "learned_range",
        },
    ),
    "facebook/DiT-XL-2-256": (
        "DDIMScheduler",
        {**DDPM, **COMMON, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0},
    ),
    "PixArt-alpha/PixArt-XL-2-1024-MS": (
        "DPMSolverMultistepScheduler",
        {**DDPM, **COMMON, **DPM, "prediction_type": "epsilon"},
    ),
    "cvssp/audioldm": (
        "DDIMScheduler",
        {**LDM, **COMMON, **SD_LEFT_OVERS, "prediction_type": "epsilon", "steps_offset": 1},
    ),
    "cvssp/audioldm2": (
        "DDIMScheduler",
        {
            **LDM,
            **COMMON,
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "sample_max_value": 1.0,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "thresholding": False,
            "timestep_spacing": "leading",
        },
    ),
    "guoyww/animatediff": (
        "DDIMScheduler",
        {
            "beta_schedule": "linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            **COMMON,
            "clip_sample": False,
            "steps_offset": 1,
            "timestep_spacing": "linspace",
        },
    ),
    "ali-vilab/i2vgen-xl": (
        "DDIMScheduler",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            **COMMON,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "set_alpha_to_one": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    ),
    "prs-eth/marigold-v1-0": (
        "DDIMScheduler",
        {
            **SD,
            **COMMON,
            **SD_LEFT_OVERS,
            "clip_sample_range": 1.0,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
    ),
    "prs-eth/marigold-depth-v1-1": (
        "DDIMScheduler",
        {
            **SD,
            **COMMON,
            **SD_LEFT_OVERS,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "steps_offset": 1,
            "timestep_spacing": "trailing",
        },
    ),
    "Tencent-Hunyuan/HunyuanDiT": (
        "DDPMScheduler",
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.03,
            **COMMON,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
    ),
    "lerobot/diffusion_pusht": (
        "DDPMScheduler",
        {
            "num_train_timesteps": 100,
            "beta_schedule": "squaredcos_cap_v2",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "prediction_type": "epsilon",
        },
    ),
    "a RePaint pipeline": ("RePaintScheduler", {**DDPM, **COMMON, "eta": 0.0}),
    "google/ncsnpp-celebahq-256": (
        "ScoreSdeVeScheduler",
        {
            "correct_steps": 1,
            "num_train_timesteps": 2000,
            "sampling_eps": 1e-05,
            "sigma_max": 1348,
            "sigma_min": 0.01,
            "snr": 0.075,
            "tensor_format": "pt",
        },
    ),
    "a VP SDE": ("ScoreSdeVpScheduler", {"beta_min": 0.1, "beta_max": 20, "sampling_eps": 1e-3}),
    "warp-ai/wuerstchen-prior": ("DDPMWuerstchenScheduler", {"s": 0.008, "scaler": 1.0}),
    "stabilityai/stable-cascade": ("DDPMWuerstchenScheduler", {"s": 0.008, "scaler": 1.0}),
    "stabilityai/stable-audio-open-1.0": (
        "CosineDPMSolverMultistepScheduler",
        {"sigma_data": 1.0, "sigma_max": 500, "sigma_min": 0.3, "prediction_type": "v_prediction"},
    ),
    "stabilityai/stable-video-diffusion-img2vid": (
        "EulerDiscreteScheduler",
        {
            **SD,
            **COMMON,
            **SD_LEFT_OVERS,
            "interpolation_type": "linear",
            "prediction_type": "v_prediction",
            "sigma_max": 700.0,
            "sigma_min": 0.002,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
        },
    ),
    "playgroundai/playground-v2.5": (
        "EDMDPMSolverMultistepScheduler",
        {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002, "prediction_type": "epsilon"},
    ),
    "stabilityai/stable-diffusion-3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "Efficient-Large-Model/Sana": (
        "DPMSolverMultistepScheduler",
        {**DDPM, **COMMON, **DPM, "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    "openai/diffusers-cd_imagenet64": ("CMStochasticIterativeScheduler", {"sigma_data": 0.5}),
    "microsoft/vq-diffusion-ithq": ("VQDiffusionScheduler", {"num_vec_classes": 4097}),
    "harmonai/maestro-150k": ("IPNDMScheduler", COMMON),
}

# In the words of the installed diffusers, which drops the old ones.
NOW = {
    "google/ddpm-cifar10-32, 0.0.4": {"num_train_timesteps": 1000, "clip_sample": True},
    "train_unconditional of 0.6, x_0": {"prediction_type": "sample"},
}

# Of another process: the reason that is given.
REFUSED = {
    "a VP SDE": "no betas of its own",
    "google/ncsnpp-celebahq-256": "no betas of its own",
    "harmonai/maestro-150k": "no betas of its own",
    "microsoft/vq-diffusion-ithq": "no betas of its own",
    "openai/diffusers-cd_imagenet64": "no betas of its own",
    "playgroundai/playground-v2.5": "no betas of its own",
    "stabilityai/stable-audio-open-1.0": "no betas of its own",
    "stabilityai/stable-cascade": "no betas of its own",
    "stabilityai/stable-diffusion-3": "no betas of its own",
    "warp-ai/wuerstchen-prior": "no betas of its own",
    "Efficient-Large-Model/Sana": "predicts a flow",
    "stabilityai/stable-video-diffusion-img2vid": "`timestep_type` is 'continuous'",
}

# Classes whose own way along the process is another one: their timesteps are no DDIM's.
SOLVERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def config_of(name):
    """Returns the config of a vintage as its file has it."""
    class_name, keys = CONFIGS[name]
    return {"_class_name": class_name, **keys}


def stock_of(name):
    """Returns the scheduler of the class that a vintage names, built by diffusers."""
    import diffusers

    class_name, keys = CONFIGS[name]
    dropped = ("timesteps", "predict_epsilon", "clip_predicted_image")
    kept = {k: v for k, v in keys.items() if k not in dropped}
    cls = getattr(diffusers, class_name.removeprefix("Flax"))
    return cls.from_config({"_class_name": cls.__name__, **kept, **NOW.get(name, {})})
