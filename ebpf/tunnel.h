// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The tunnel (VXLAN, RFC 7348) without its device: headers are as the kernel's device writes and reads them,
// so either end may do without the other's programs.
#pragma once
#include "age.h"
#include "flow.h"

// There is a network's number (RFC 7348, 5).
#define VXLAN_HAS_NETWORK 0x08000000
// The lowest source port, and how many there are: as many as a flow's hash chooses among.
#define TUNNEL_PORTS 0xc000
#define TUNNEL_PORTS_MASK 0x3fff
#define TUNNEL_TTL 64

// What this kernel's header does not have yet.
#define ROOM_DECAP_L3_IPV4 (1ULL << 7)
#define ROOM_DECAP_L3_IPV6 (1ULL << 8)

// What comes after the outer addresses.
struct tunnel_headers {
    struct udphdr udp;
    __be32 flags;
    // In the upper 24 bits.
    __be32 network;
    struct frame frame;
    // How a packet of IPv4 within begins, which lies at no multiple of four.
    __be16 within[sizeof(struct opening) / 2];
};

// What a packet in the tunnel begins with. The first field is not written: with it all lie where they can be
// written as a whole.
struct tunnel_ipv4 {
    __u16 before;
    struct frame frame;
    struct iphdr ip;
    struct tunnel_headers headers;
};

struct tunnel_ipv6 {
    __u16 before;
    struct frame frame;
    struct ipv6hdr ip;
    struct tunnel_headers headers;
};

// How long the headers after the addresses are.
#define TUNNEL_HEADERS offsetof(struct tunnel_headers, within)

// A length as a header has it; none where it has no room for it, since the packet is cut later.
static __always_inline __be16 length_of(__u32 length) {
    return length > 0xffff ? 0 : bpf_htons(length);
}

// What is put into the tunnel.
struct tunnel {
    struct flow *flow;
    const struct packet *packet;
    // Of the frame within.
    __u32 length;
    __u32 hash;
    __be16 protocol;
};

// Writes what comes after the outer addresses, before the packet at this place of the frame.
static __always_inline int write_headers(
    struct __sk_buff *skb, struct tunnel_headers *headers, const struct tunnel *tunnel, __u32 at) {
    struct opening within;
    headers->udp.source = bpf_htons(TUNNEL_PORTS | (tunnel->hash & TUNNEL_PORTS_MASK));
    headers->udp.dest = tunnel->flow->way.port;
    headers->udp.len = length_of(tunnel->length + TUNNEL_HEADERS - ETH_HLEN);
    // None, as the kernel's device does over IPv4; over IPv6 tunnels may do without too (RFC 6935).
    headers->udp.check = 0;
    headers->flags = bpf_htonl(VXLAN_HAS_NETWORK);
    headers->network = bpf_htonl(tunnel->packet->tuple.network << 8);
    headers->frame.source = tunnel->flow->way.local_mac;
    headers->frame.destination = tunnel->flow->way.remote_mac;
    headers->frame.protocol = tunnel->protocol;
    if (!tunnel->packet->ipv4)
        return age_ipv6(skb, tunnel->packet, at);
    if (read_aged_ipv4(skb, tunnel->packet, at, &within))
        return -1;
    __builtin_memcpy(headers->within, &within, sizeof headers->within);
    return 0;
}

// Writes the first bytes of a frame: up to the packet within, or with how one of IPv4 begins.
static __always_inline int
write_first(struct __sk_buff *skb, const struct tunnel *tunnel, const struct frame *first, __u32 length) {
    return tunnel->packet->ipv4 ? bpf_skb_store_bytes(skb, 0, first, length + sizeof(struct opening), 0)
                                : bpf_skb_store_bytes(skb, 0, first, length, 0);
}

static __always_inline int write_ipv4(struct __sk_buff *skb, const struct tunnel *tunnel) {
    const struct exit *exit = &tunnel->flow->exit;
    const __u32 length = ETH_HLEN + sizeof(struct iphdr) + TUNNEL_HEADERS;
    struct tunnel_ipv4 outer = {
        // Where the way out is not known the kernel writes its addresses.
        .frame = {exit->destination, exit->source, bpf_htons(ETH_P_IP)},
        .ip = {
            .version = 4,
            .ihl = sizeof outer.ip / 4,
            .tos = tunnel->packet->congestion,
            .tot_len = length_of(tunnel->length + sizeof outer.ip + TUNNEL_HEADERS - ETH_HLEN),
            .id = tunnel->flow->number++,
            .ttl = TUNNEL_TTL,
            .protocol = IPPROTO_UDP,
            .saddr = tunnel->flow->way.local.words[3],
            .daddr = tunnel->flow->way.remote.words[3],
        },
    };
    outer.ip.check = checksum_of(&outer.ip);
    return write_headers(skb, &outer.headers, tunnel, length) ||
           write_first(skb, tunnel, &outer.frame, length);
}

static __always_inline int write_ipv6(struct __sk_buff *skb, const struct tunnel *tunnel) {
    const struct exit *exit = &tunnel->flow->exit;
    const __u32 length = ETH_HLEN + sizeof(struct ipv6hdr) + TUNNEL_HEADERS;
    struct tunnel_ipv6 outer = {.frame = {exit->destination, exit->source, bpf_htons(ETH_P_IPV6)}};
    outer.ip.version = 6;
    // The bits for congestion end the traffic class, whose lower half is here.
    outer.ip.flow_lbl[0] = tunnel->packet->congestion << 4;
    outer.ip.payload_len = length_of(tunnel->length + TUNNEL_HEADERS - ETH_HLEN);
    outer.ip.nexthdr = IPPROTO_UDP;
    outer.ip.hop_limit = TUNNEL_TTL;
    __builtin_memcpy(&outer.ip.saddr, &tunnel->flow->way.local, sizeof outer.ip.saddr);
    __builtin_memcpy(&outer.ip.daddr, &tunnel->flow->way.remote, sizeof outer.ip.daddr);
    return write_headers(skb, &outer.headers, tunnel, length) ||
           write_first(skb, tunnel, &outer.frame, length);
}

// Where a packet in the tunnel comes from, and where it begins.
struct arrival {
    struct address remote;
    struct address local;
    __u32 network;
    // Its own header, from the start of the outer frame.
    __u32 at;
    __be16 port;
    __be16 protocol;
    // The Ethernet address of this end.
    struct mac router;
    __u8 congestion;
};

// Reads the headers of the tunnel; fails for what has none, or others than a node's.
static __always_inline int read_tunnel(struct __sk_buff *skb, struct arrival *arrival) {
    struct tunnel_headers headers;
    if (skb->protocol == bpf_htons(ETH_P_IP)) {
        struct iphdr ip;
        if (load(skb, ETH_HLEN, &ip, sizeof ip) || ip.protocol != IPPROTO_UDP ||
            ip.version != 4 || ip.ihl != 5 || ip.frag_off & bpf_htons(FRAGMENT_MORE | FRAGMENT_OFFSET))
            return -1;
        map_ipv4(&arrival->remote, ip.saddr);
        map_ipv4(&arrival->local, ip.daddr);
        arrival->congestion = ip.tos & CONGESTION;
        arrival->at = ETH_HLEN + sizeof ip;
    } else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr ip;
        if (load(skb, ETH_HLEN, &ip, sizeof ip) || ip.nexthdr != IPPROTO_UDP ||
            ip.version != 6)
            return -1;
        copy_ipv6(&arrival->remote, &ip.saddr);
        copy_ipv6(&arrival->local, &ip.daddr);
        arrival->congestion = ip.flow_lbl[0] >> 4 & CONGESTION;
        arrival->at = ETH_HLEN + sizeof ip;
    } else {
        return -1;
    }
    if (load(skb, arrival->at, &headers, TUNNEL_HEADERS) ||
        headers.flags != bpf_htonl(VXLAN_HAS_NETWORK))
        return -1;
    arrival->at += TUNNEL_HEADERS;
    arrival->port = headers.udp.dest;
    arrival->network = bpf_ntohl(headers.network) >> 8;
    arrival->protocol = headers.frame.protocol;
    arrival->router = headers.frame.destination;
    return 0;
}

// Takes the headers of the tunnel away.
static __always_inline int strip(struct __sk_buff *skb, const struct arrival *arrival) {
    __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
    // Kernels that know no such flag carry no other family within.
    if (skb->protocol != arrival->protocol)
        flags |= arrival->protocol == bpf_htons(ETH_P_IP) ? ROOM_DECAP_L3_IPV4 : ROOM_DECAP_L3_IPV6;
    return bpf_skb_adjust_room(skb, ETH_HLEN - (__s32)arrival->at, BPF_ADJ_ROOM_MAC, flags);
}
