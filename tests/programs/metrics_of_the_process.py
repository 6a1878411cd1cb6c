"""The metrics of a process, in two registries."""

import mlx.core as mx
import prometheus_client

import mlx_safe

mlx_safe.install()
mlx_safe.metrics.register()
mlx_safe.metrics.register()
own = prometheus_client.CollectorRegistry()
mlx_safe.metrics.register(own)
mlx_safe.testing.record_fault(2)
print(float(own.get_sample_value("mlx_safe_faults_total") or 0))
x = mx.ones(1 << 20)
mx.eval(x)
print((own.get_sample_value("mlx_safe_memory_active_bytes") or 0) >= 4 << 20)
text = prometheus_client.generate_latest().decode()
print(text.count("TYPE mlx_safe_faults_total"))
