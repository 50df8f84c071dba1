"""Answers as they look, for the OpenAPI description; the tests read them as what they show."""

from typing import Any

_METRICS: dict[str, Any] = {
    "cpu_percent": 12.5,
    "cpu_cores_physical": 16,
    "cpu_cores_available": 14,
    "cpu_load_1min": 1.2,
    "cpu_load_5min": 1.1,
    "memory_percent": 41.0,
    "memory_available_gb": 37.5,
    "gpu_vram_total_gb": 24.0,
    "gpu_vram_available_gb": 20.5,
    "gpu_vram_max_available_gb": 20.5,
    "gpu_type": "nvidia",
    "gpu_sample_age_seconds": 0.4,
}
AGENT_ID = "3f1c0a52-1c1b-4a0e-9d5c-2f7a5d1e8b90"

RESERVATION_ID = "0f6b3a80-8a52-4a59-9f9d-0d1c3f6f8f11"

AGENT_CAPACITY: dict[str, Any] = {
    "agent_id": AGENT_ID,
    "status": "online",
    **_METRICS,
    "timestamp": "2026-01-01T00:00:00Z",
    "heartbeat_age_seconds": 2.1,
}
OFFER: dict[str, Any] = {
    "agent_id": AGENT_ID,
    "agent_type": "desktop",
    "pool_name": "default",
    "hostname": "rig-7",
    "status": "online",
    "gpu_type": "nvidia",
    "gpu_vram_available_gb": 20.5,
    "gpu_vram_max_available_gb": 20.5,
    "gpu_vram_total_gb": 24.0,
    "gpu_sample_age_seconds": 0.4,
    "cpu_cores_available": 14,
    "cpu_load_1min": 1.2,
    "memory_available_gb": 37.5,
    "performance_score": 0.0,
    "last_heartbeat_at": "2026-01-01T00:00:00Z",
    "heartbeat_age_seconds": 2.1,
}
AGENT: dict[str, Any] = {
    "agent_id": AGENT_ID,
    "agent_type": "desktop",
    "pool_name": "default",
    "capabilities": ["gpu"],
    "status": "online",
    "hostname": "rig-7",
    "agent_version": "0.1.0",
    "incarnation": 1767225600000,
    "sequence": 42,
    "sent_at": "2026-01-01T00:00:00Z",
    "interval_seconds": 5.0,
    "lease_seconds": 15.0,
    "drained": False,
    "drain_reason": None,
    "drained_at": None,
    "drain_deadline": None,
    "last_heartbeat_at": "2026-01-01T00:00:00Z",
    "performance_score": 0.0,
    "status_reason": None,
    "status_changed_at": "2026-01-01T00:00:00Z",
    "lower_incarnations": 0,
    "lower_incarnation_at": None,
    "clock_skew_seconds": -0.01,
    "queue_delay_seconds": 0.003,
    "heartbeat_age_seconds": 2.1,
    "is_silent": False,
    "resources": {
        **_METRICS,
        "gpus": [
            {
                "uuid": "GPU-1",
                "index": 0,
                "name": "NVIDIA GeForce RTX 4090",
                "vram_total_gb": 24.0,
                "vram_available_gb": 20.5,
                "utilization_percent": 3.0,
                "is_unified": False,
            }
        ],
        "probe_errors": [],
    },
    "reserved": [
        {
            "reservation_id": RESERVATION_ID,
            "fence": 7,
            "gpus": [{"uuid": "GPU-1", "index": 0, "vram_gb": 12.0}],
            "cpu_cores": 4,
            "memory_gb": 8.0,
        }
    ],
    "available": {
        "gpu_vram_gb": 8.5,
        "single_gpu_vram_gb": 8.5,
        "cpu_cores": 10,
        "memory_gb": 29.5,
    },
}
RESERVATION: dict[str, Any] = {
    "reservation_id": RESERVATION_ID,
    "holder": "trainer-3",
    "idempotency_key": "5b0f9a3c-5c60-4c0a-8b9f-3a1d1f0f6a11",
    "state": "held",
    "reason": None,
    "fence": 7,
    "lease_seconds": 60.0,
    "created_at": "2026-01-01T00:00:00Z",
    "expires_at": "2026-01-01T00:01:00Z",
    "ended_at": None,
    "as_of": "2026-01-01T00:00:00Z",
    "agent_id": AGENT_ID,
    "hostname": "rig-7",
    "gpus": [{"uuid": "GPU-1", "index": 0, "vram_gb": 12.0}],
    "gpu_vram_gb": 12.0,
    "cpu_cores": 4,
    "memory_gb": 8.0,
    "places": [
        {
            "agent_id": AGENT_ID,
            "hostname": "rig-7",
            "pool_name": "default",
            "gpus": [{"uuid": "GPU-1", "index": 0, "vram_gb": 12.0}],
        }
    ],
    "alternative": 0,
}
FLEET: dict[str, Any] = {
    "as_of": "2026-01-01T00:00:02Z",
    "degraded": False,
    "is_recording": True,
    "recording_age_seconds": 0.7,
    "trouble": None,
    "pools_in_outage": [],
    "online": 11,
    "busy": 1,
    "offline": 2,
    "silent": 0,
    "reservations": 3,
    "waiting": 0,
}
CAPACITY: dict[str, Any] = {
    "offers": {
        "as_of": "2026-01-01T00:00:02Z",
        "degraded": False,
        "total_matches": 1,
        "total_relation": "eq",
        "agents": [OFFER],
    },
    "explanation": {
        "as_of": "2026-01-01T00:00:02Z",
        "agents": 2,
        "fitting": 1,
        "summary": "2 agents: 1 fit, 1 too little free VRAM (best 8 of 20 on rig-2)",
        "obstacles": [
            {
                "rule": "min_gpu_vram_gb",
                "agents": 1,
                "needed": 20.0,
                "most": 8.0,
                "hostname": "rig-2",
                "message": "too little free VRAM (best 8 of 20 on rig-2)",
            }
        ],
        "nearest": [
            {
                "agent_id": "77d2b1de-33b1-4ae0-a2c5-3f0f5f1f2b11",
                "hostname": "rig-2",
                "pool_name": "default",
                "reasons": ["too little free VRAM (8 of 20)"],
            }
        ],
        "relaxation": None,
    },
}


def shown(example: Any, **more: Any) -> dict[str, Any]:
    """Return the OpenAPI entry of an answer with its example."""
    return {"content": {"application/json": {"example": example}}, **more}
