// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The tunnel (VXLAN, RFC 7348) without its device: headers are as the kernel's device writes and reads them,
// so either end may do without the other's programs.
#pragma once
#include "packet.h"

// There is a network's number (RFC 7348, 5).
#define VXLAN_HAS_NETWORK 0x08000000
// The lowest source port, and how many there are: as many as a flow's hash chooses among.
#define TUNNEL_PORTS 0xc000
#define TUNNEL_PORTS_MASK 0x3fff
#define TUNNEL_TTL 64
// Congestion that a router marked (RFC 3168, 5), of the two bits that are for it.
#define CONGESTION 3

// What this kernel's header does not have yet.
#define ROOM_DECAP_L3_IPV4 (1ULL << 7)
#define ROOM_DECAP_L3_IPV6 (1ULL << 8)

// What comes after the outer addresses.
struct tunnel_headers {
    struct udphdr udp;
    __be32 flags;
    // In the upper 24 bits.
    __be32 network;
    struct ethhdr frame;
} __attribute__((packed));

struct tunnel_ipv4 {
    struct ethhdr frame;
    struct iphdr ip;
    struct tunnel_headers headers;
} __attribute__((packed));

struct tunnel_ipv6 {
    struct ethhdr frame;
    struct ipv6hdr ip;
    struct tunnel_headers headers;
} __attribute__((packed));

// A length as a header has it; none where it has no room for it, since the packet is cut later.
static __always_inline __be16 length_of(__u32 length) {
    return length > 0xffff ? 0 : bpf_htons(length);
}

static __always_inline __sum16 checksum_of(struct iphdr *ip) {
    __u32 sum = bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof *ip, 0);
    sum = (sum & 0xffff) + (sum >> 16);
    return ~((sum & 0xffff) + (sum >> 16));
}

// The two bits of a packet that tell of congestion.
static __always_inline int congestion_of(struct __sk_buff *skb, bool ipv4, __u32 at) {
    __u8 bytes[2];
    if (bpf_skb_load_bytes(skb, at, bytes, sizeof bytes))
        return -1;
    return (ipv4 ? bytes[1] : bytes[1] >> 4) & CONGESTION;
}

struct tunnel {
    const struct way *way;
    __u32 network;
    // Of the frame within.
    __u32 length;
    __u32 hash;
    __be16 protocol;
    __u8 congestion;
};

static __always_inline void write_headers(struct tunnel_headers *headers, const struct tunnel *tunnel) {
    headers->udp.source = bpf_htons(TUNNEL_PORTS | (tunnel->hash & TUNNEL_PORTS_MASK));
    headers->udp.dest = tunnel->way->port;
    headers->udp.len = length_of(tunnel->length + sizeof *headers - sizeof headers->frame);
    // None, as the kernel's device does over IPv4; over IPv6 tunnels may do without too (RFC 6935).
    headers->udp.check = 0;
    headers->flags = bpf_htonl(VXLAN_HAS_NETWORK);
    headers->network = bpf_htonl(tunnel->network << 8);
    __builtin_memcpy(headers->frame.h_source, tunnel->way->local_mac, ETH_ALEN);
    __builtin_memcpy(headers->frame.h_dest, tunnel->way->remote_mac, ETH_ALEN);
    headers->frame.h_proto = tunnel->protocol;
}

static __always_inline int write_ipv4(struct __sk_buff *skb, const struct tunnel *tunnel) {
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct tunnel_ipv4 *outer = data;
    if ((void *)(outer + 1) > end)
        return -1;
    struct iphdr ip = {
        .version = 4,
        .ihl = sizeof ip / 4,
        .tos = tunnel->congestion,
        .tot_len = length_of(tunnel->length + sizeof *outer - 2 * sizeof(struct ethhdr)),
        .id = bpf_get_prandom_u32(),
        .ttl = TUNNEL_TTL,
        .protocol = IPPROTO_UDP,
        .saddr = tunnel->way->local.words[3],
        .daddr = tunnel->way->remote.words[3],
    };
    ip.check = checksum_of(&ip);
    outer->frame.h_proto = bpf_htons(ETH_P_IP);
    outer->ip = ip;
    write_headers(&outer->headers, tunnel);
    return 0;
}

static __always_inline int write_ipv6(struct __sk_buff *skb, const struct tunnel *tunnel) {
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct tunnel_ipv6 *outer = data;
    if ((void *)(outer + 1) > end)
        return -1;
    outer->frame.h_proto = bpf_htons(ETH_P_IPV6);
    outer->ip.version = 6;
    outer->ip.priority = 0;
    // The bits for congestion end the traffic class, whose lower half is here.
    outer->ip.flow_lbl[0] = tunnel->congestion << 4;
    outer->ip.flow_lbl[1] = 0;
    outer->ip.flow_lbl[2] = 0;
    outer->ip.payload_len = length_of(tunnel->length + sizeof outer->headers - ETH_HLEN);
    outer->ip.nexthdr = IPPROTO_UDP;
    outer->ip.hop_limit = TUNNEL_TTL;
    __builtin_memcpy(&outer->ip.saddr, &tunnel->way->local, sizeof outer->ip.saddr);
    __builtin_memcpy(&outer->ip.daddr, &tunnel->way->remote, sizeof outer->ip.daddr);
    write_headers(&outer->headers, tunnel);
    return 0;
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
    __u8 congestion;
};

// Reads the headers of the tunnel; fails for what has none, or others than a node's.
static __always_inline int read_tunnel(struct __sk_buff *skb, struct arrival *arrival) {
    struct tunnel_headers headers;
    if (skb->protocol == bpf_htons(ETH_P_IP)) {
        struct iphdr ip;
        if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof ip) || ip.protocol != IPPROTO_UDP ||
            ip.version != 4 || ip.ihl != 5 || ip.frag_off & bpf_htons(FRAGMENT_MORE | FRAGMENT_OFFSET))
            return -1;
        map_ipv4(&arrival->remote, ip.saddr);
        map_ipv4(&arrival->local, ip.daddr);
        arrival->congestion = ip.tos & CONGESTION;
        arrival->at = ETH_HLEN + sizeof ip;
    } else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr ip;
        if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof ip) || ip.nexthdr != IPPROTO_UDP ||
            ip.version != 6)
            return -1;
        copy_ipv6(&arrival->remote, &ip.saddr);
        copy_ipv6(&arrival->local, &ip.daddr);
        arrival->congestion = ip.flow_lbl[0] >> 4 & CONGESTION;
        arrival->at = ETH_HLEN + sizeof ip;
    } else {
        return -1;
    }
    if (bpf_skb_load_bytes(skb, arrival->at, &headers, sizeof headers) ||
        headers.flags != bpf_htonl(VXLAN_HAS_NETWORK))
        return -1;
    arrival->at += sizeof headers;
    arrival->port = headers.udp.dest;
    arrival->network = bpf_ntohl(headers.network) >> 8;
    arrival->protocol = headers.frame.h_proto;
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
