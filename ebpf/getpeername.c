// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// getpeername(2): who has connected to a service sees the service.
#include "socket.h"

static __always_inline bool ask_for_service(struct bpf_sock_addr *ctx, struct target *target) {
    __u64 number = bpf_get_socket_cookie(ctx);
    struct socket *socket = bpf_map_lookup_elem(&sockets, &number);
    if (!socket || !is_target(target, &socket->backend, socket->backend_port))
        return false;
    target->address = socket->service;
    target->port = socket->service_port;
    return true;
}

SEC("cgroup/getpeername4")
int netctl_peer4(struct bpf_sock_addr *ctx) {
    struct target target = target4(ctx);
    return ask_for_service(ctx, &target) ? put4(ctx, &target) : ALLOW;
}

SEC("cgroup/getpeername6")
int netctl_peer6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    return ask_for_service(ctx, &target) ? put6(ctx, &target) : ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
