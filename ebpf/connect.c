// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// connect(2) of a container's TCP socket: to a service it is to a backend. What is connected costs nothing from
// there on, since no packet of it bears the service's address.
//
// UDP is left to its packets. A socket that is connected is never asked again, so it would stay with a backend
// that is gone.
#include "socket.h"

// Gives whether a socket's target is another one now.
static __always_inline bool connect_to_service(struct bpf_sock_addr *ctx, struct target *target) {
    struct tuple tuple = {};
    struct target got = {};
    if (ctx->protocol != IPPROTO_TCP)
        return false;
    // What it has asked for before, if it connects anew.
    __u64 number = bpf_get_socket_cookie(ctx);
    struct socket *before = bpf_map_lookup_elem(&sockets, &number);
    if (before)
        closed(number, before);
    __u32 chosen = is_for_service(ctx, target, &tuple) ? choose(&tuple, &got, 0) : 0;
    if (!chosen)
        return false;
    struct socket socket = {
        .namespace = bpf_get_netns_cookie(ctx),
        .service = target->address,
        .backend = got.address,
        .service_port = target->port,
        .backend_port = got.port,
        .number = chosen,
        .since = seconds(),
        .state = SOCKET_OPENING,
    };
    // What is not known here nobody waits for when the backend is drained.
    if (bpf_map_update_elem(&sockets, &number, &socket, BPF_ANY))
        return false;
    // One that has gone meanwhile: the agent may not have seen that this socket has it.
    if (!opened(chosen)) {
        bpf_map_delete_elem(&sockets, &number);
        return false;
    }
    show(&tuple, &got, 0);
    *target = got;
    return true;
}

SEC("cgroup/connect4")
int netctl_connect4(struct bpf_sock_addr *ctx) {
    struct target target = target4(ctx);
    if (connect_to_service(ctx, &target))
        put4(ctx, &target);
    return ALLOW;
}

SEC("cgroup/connect6")
int netctl_connect6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    if (connect_to_service(ctx, &target))
        put6(ctx, &target);
    return ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
