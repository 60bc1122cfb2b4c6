// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// connect(2) of a container's TCP socket: to a service it is to a backend. What is connected costs nothing from
// there on, since no packet of it bears the service's address.
//
// UDP is left to its packets. A socket that is connected is never asked again, so it would stay with a backend
// that is gone.
#include "socket.h"

// Forgets what a socket has asked for before.
static __always_inline void forget_socket(__u64 number) {
    struct socket *socket = bpf_map_lookup_elem(&sockets, &number);
    if (!socket)
        return;
    leave(socket->number);
    bpf_map_delete_elem(&sockets, &number);
}

// Gives whether a socket's target is another one now.
static __always_inline bool connect_to_service(struct bpf_sock_addr *ctx, struct target *target) {
    struct question question = {};
    struct target service, got = {};
    if (ctx->protocol != IPPROTO_TCP)
        return false;
    __u64 number = bpf_get_socket_cookie(ctx);
    forget_socket(number);
    service = *target;
    if (!is_for_service(ctx, &service, &question))
        return false;
    __u32 chosen = choose(&question, &got);
    struct backend *backend = chosen ? bpf_map_lookup_elem(&backends, &chosen) : NULL;
    if (!backend)
        return false;
    struct socket socket = {
        .namespace = bpf_get_netns_cookie(ctx),
        .service = service.address,
        .backend = got.address,
        .service_port = service.port,
        .backend_port = got.port,
        .number = chosen,
        .since = seconds(),
        .state = SOCKET_OPENING,
    };
    // What is not known here nobody waits for when the backend is drained.
    if (bpf_map_update_elem(&sockets, &number, &socket, BPF_ANY))
        return false;
    __sync_fetch_and_add(&backend->open, 1);
    count_connection(chosen);
    show(&question, &got);
    *target = got;
    return true;
}

SEC("cgroup/connect4")
int netctl_connect4(struct bpf_sock_addr *ctx) {
    struct target target = target4(ctx);
    return connect_to_service(ctx, &target) ? put4(ctx, &target) : ALLOW;
}

SEC("cgroup/connect6")
int netctl_connect6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    return connect_to_service(ctx, &target) ? put6(ctx, &target) : ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
