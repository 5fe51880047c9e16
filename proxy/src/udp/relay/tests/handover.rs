//! Tests of flows that another process takes over.

use rproxy_mapping::access::AccessList;

use super::*;

/// A flow of `client`, as another process hands it over, whose local address is the returned one.
fn live(scene: &Scene, client: &UdpSocket) -> (LiveFlow, SocketAddr) {
    let socket = socket();
    socket.connect(address(&scene.backend)).unwrap();
    let local = address(&socket);
    let (listener, client, socket) = (scene.port.number(), address(client), Arc::new(socket.into()));
    let flow = LiveFlow {
        listener,
        client,
        local: None,
        told: None,
        header: HeaderState::default(),
        is_established: true,
        peer: None,
        dropped: 0,
        socket,
    };
    (flow, local)
}

#[test]
fn what_a_listener_has_lost_is_handed_over_once_it_has_lost_some() {
    let mut scene = Scene::new(Limits::default());
    assert_eq!(scene.relay.pause().dropped, []);
    scene.relay.resume();
    let number = scene.port.number();
    scene.relay.listeners[number].dropped = 7;
    assert_eq!(scene.relay.pause().dropped, [(number, 7)]);
}

#[test]
fn a_flow_of_a_client_that_is_denied_now_is_not_taken_over() {
    let access = AccessList { deny: vec![parse_network("127.0.0.0/8").unwrap()], ..Default::default() };
    let mut scene = Scene::new(Limits { access, ..Limits::default() });
    let client = scene.client();
    let (flow, _local) = live(&scene, &client);
    scene.relay.adopt(LiveFlows { flows: vec![flow], ..LiveFlows::default() });
    assert_eq!(scene.relay.table.len(), 0);
}

#[test]
fn a_client_that_has_a_flow_already_keeps_it() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, own) = scene.at_backend();
    let (flow, other) = live(&scene, &client);
    scene.relay.adopt(LiveFlows { flows: vec![flow], ..LiveFlows::default() });
    assert_eq!(scene.relay.table.len(), 1);
    client.send(b"goes on").unwrap();
    assert_eq!(scene.at_backend(), (b"goes on".to_vec(), own));
    assert_ne!(own, other);
}

#[test]
fn a_process_that_leaves_touches_no_flow_of_the_next_one() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let LiveFlows { flows, .. } = scene.relay.pause();
    scene.backend.send_to(b"for the next", flow).unwrap();
    scene.relay.leave();
    scene.relay.close_ended(1);
    assert_eq!((scene.relay.table.len(), scene.stats().flows.get()), (0, 0));
    let number = scene.port.number();
    assert!(scene.relay.listeners.get_mut(number).is_none());
    scene.settle();
    let socket = UdpSocket::from(flows[0].socket.try_clone().unwrap());
    assert_eq!(socket.recv(&mut [0; 20]).unwrap(), 12);
    assert_eq!(scene.failures(FailureKind::NoBuffer), 0);
}

#[test]
fn only_the_flows_of_a_listener_that_is_shut_down_end() {
    let mut scene = Scene::new(Limits::default());
    let other = socket();
    let front = address(&other);
    let port = Arc::new(scene.set.add(other).unwrap());
    scene.serve_port(&port, &scene.target.clone());
    let stays = scene.client();
    stays.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let ends = socket();
    ends.send_to(b"hello", front).unwrap();
    scene.at_backend();
    SockRef::from(&port.as_fd()).shutdown(Shutdown::Read).unwrap_err();
    scene.settle();
    assert_eq!(scene.relay.table.len(), 1);
    stays.send(b"goes on").unwrap();
    assert_eq!(scene.at_backend(), (b"goes on".to_vec(), flow));
}

#[test]
fn other_limits_apply_to_flows_that_there_are() {
    let mut scene = Scene::new(Limits::default());
    let clients = [scene.client(), scene.client()];
    for client in &clients {
        client.send(b"hello").unwrap();
        scene.at_backend();
    }
    let limits = Limits { udp_max_flows: Some(1), ..Limits::default() };
    let policy = Arc::new(MappingPolicy { limits: limits.into(), state: scene.target.policy.state.clone() });
    let port_mapping = scene.target.port_mapping.clone();
    let port = scene.port.clone();
    scene.serve_port(&port, &Arc::new(Target::new(port_mapping, policy)));
    assert_eq!(scene.relay.table.len(), 1);
    assert_eq!(scene.failures(FailureKind::FlowDisplaced), 1);
}
