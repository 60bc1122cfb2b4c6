// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// getpeername(2): who has connected to a service sees the service.
#include "socket.h"

// Gives whether a socket has got its peer for a service, which is its target now.
static __always_inline bool has_asked(struct bpf_sock_addr *ctx, struct target *target) {
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
    if (has_asked(ctx, &target))
        put4(ctx, &target);
    return ALLOW;
}

SEC("cgroup/getpeername6")
int netctl_peer6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    if (has_asked(ctx, &target))
        put6(ctx, &target);
    return ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
